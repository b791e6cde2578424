"""What CLIP reads: texts as tokens, pictures as pixels."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from mllm_jax.models.clip_text import ClipPairConfig
from mllm_jax.processors import image_processors, tokenizers
from mllm_jax.processors import pictures as picture_files


class ClipProcessor:
    """A tokenizer and an image processor: those of the checkpoint.

    Args:
      tokenizer: of transformers. pictures: the image processor (PIL backend).
      config: of the model.
    """

    def __init__(self, tokenizer, pictures, config: ClipPairConfig):
        self.tokenizer = tokenizer
        self.config = config
        self._pictures = pictures

    @classmethod
    def from_directory(cls, directory: pathlib.Path, config: ClipPairConfig) -> ClipProcessor:
        """Of a local checkpoint directory."""
        tokenizer = tokenizers.read_tokenizer(directory)
        return cls(tokenizer, image_processors.read(directory), config)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """int32[C, T]: texts as tokens, filled up with 0 behind their ends.

        Raises:
          ValueError: a text is too long, or its tokens are not the model's.
        """
        coded = self.tokenizer(list(texts))["input_ids"]
        out = np.zeros((len(coded), max(map(len, coded))), np.int32)
        for row, ids, text in zip(out, coded, texts, strict=True):
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
                f"whose texts end in {config.end}: its tokenizer is another model's"
            )

    def pictures(self, pictures: Sequence) -> np.ndarray:
        """float32[I, row, column, 3]: pictures, see `pictures.read`, as pixels."""
        images = [
            picture_files.read(picture, f"picture {number}")
            for number, picture in enumerate(pictures)
        ]
        values = self._pictures(images, return_tensors="np")["pixel_values"]
        return np.moveaxis(values, 1, -1)
