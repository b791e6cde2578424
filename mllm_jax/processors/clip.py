"""CLIP's processor: texts to tokens, pictures to pixels."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_jax.models.clip_text import ClipPairConfig
from mllm_jax.processors import image_processors, tokenizers
from mllm_jax.processors import pictures as picture_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ClipProcessor:
    """The tokenizer and the image processor of a checkpoint.

    Args:
      tokenizer: A tokenizer of transformers.
      pictures: The image processor of transformers (PIL backend).
      config: The model's config.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pictures: Callable[..., Any],
        config: ClipPairConfig,
    ):
        self.tokenizer = tokenizer
        self.config = config
        self._pictures = pictures

    @classmethod
    def from_directory(cls, directory: pathlib.Path, config: ClipPairConfig) -> ClipProcessor:
        """Return the processor of a local checkpoint directory."""
        tokenizer = tokenizers.read_tokenizer(directory)
        return cls(tokenizer, image_processors.read(directory), config)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the ids of texts, int32[C, T], padded with 0.

        Raises:
          ValueError: A text is too long, or its tokens do not fit the model.
        """
        encoded = self.tokenizer(list(texts))["input_ids"]
        out = np.zeros((len(encoded), max(map(len, encoded))), np.int32)
        for row, ids, text in zip(out, encoded, texts, strict=True):
            self._check(text, ids)
            row[: len(ids)] = ids
        return out

    def _check(self, text: str, ids: Sequence[int]) -> None:
        config = self.config.text
        if len(ids) > config.positions:
            raise ValueError(
                f"the text {text!r} has {len(ids)} tokens, more than this CLIP's {config.positions}"
            )
        if max(ids) >= config.vocab or config.end not in (None, *ids):
            raise ValueError(
                f"the tokens {list(ids)} of {text!r} do not fit a CLIP of {config.vocab} tokens "
                f"whose texts end in {config.end}: use the tokenizer of this model"
            )

    def pictures(self, pictures: Sequence) -> np.ndarray:
        """Return float32[I, row, column, 3], the pixels of pictures; see `pictures.read`."""
        images = [
            picture_files.read(picture, f"picture {number}")
            for number, picture in enumerate(pictures)
        ]
        values = self._pictures(images, return_tensors="np")["pixel_values"]
        return np.moveaxis(values, 1, -1)
