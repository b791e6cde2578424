"""The processor of InstructBLIP, whose Q-Former reads the instruction as well as the LM does."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.files import shown
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.processors import prompts as prompts_
from mllm_jax.processors import tokenizers
from mllm_jax.processors.chat_template import Questions
from mllm_jax.processors.processor import Processor
from mllm_jax.processors.prompts import IMAGE, Chat
from mllm_jax.processors.rows import Picture, Row, round_up_length, text_tokens


class InstructBlipProcessor(Processor):
    """A `Processor` with image tokens before all text, and with a second tokenizer.

    The tokens of the Q-Former are of kind question; those that its tokenizer adds ([CLS], [SEP])
    are of kind system. The features of a picture depend on the question, so `pack` encodes a
    picture for each question.

    Args:
      tokenizer: As in `Processor`.
      pictures: As in `Processor`.
      config: As in `Processor`.
      directory: As in `Processor`.
      qformer_tokenizer: The fast tokenizer of the Q-Former.
      **options: Further arguments of `Processor`.
    """

    config: InstructBlipConfig
    reencode_per_question = True

    def __init__(
        self, tokenizer, pictures, config, directory=None, *, qformer_tokenizer, **options
    ):
        super().__init__(tokenizer, pictures, config, directory, **options)
        self.qformer_tokenizer = qformer_tokenizer

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike, config: MultimodalConfig, **options: Any
    ) -> InstructBlipProcessor:
        """Return the processor of a directory; the Q-Former's tokenizer is in a subdirectory."""
        tokenizer = tokenizers.read_tokenizer(pathlib.Path(directory) / "qformer_tokenizer")
        options["qformer_tokenizer"] = tokenizer
        return cast(InstructBlipProcessor, super().from_directory(directory, config, **options))

    def render(self, prompt: str | Chat, images: int) -> tuple[str, Questions]:
        """Return the text of a prompt without its pictures, and the spans of the question."""
        if not isinstance(prompt, str):
            if len(prompts_.image_parts(prompt)) not in (0, images):
                raise ValueError(
                    f"the chat has {len(prompts_.image_parts(prompt))} pictures, not {images}"
                )
            return super().render(prompts_.without_images(prompt), 0)
        if IMAGE not in prompt:
            return super().render(prompt, 0)
        text = prompt.removeprefix(IMAGE * images)
        if IMAGE in text:
            raise ValueError(
                f"the prompt {shown(prompt)} does not begin with one {IMAGE} for each of {images} "
                "pictures: InstructBLIP reads them before the text"
            )
        return text, (slice(0, len(text)),)

    def _encode_prompt(self, prompt: str | Chat, pictures: Sequence[Picture], first: int) -> Row:
        text, questions = self.render(prompt, len(pictures))
        if IMAGE in text:
            raise ValueError(f"{IMAGE} is inside the text: InstructBLIP reads pictures before it")
        row = Row()
        for number, picture in enumerate(pictures, first):
            for run in self._picture_runs(number, picture):
                row.add(run)
        row.add(text_tokens(*self._tokenize(prompt, text, questions)))
        qformer_row, qformer = Row(), self.config.qformer
        qformer_row.add(
            text_tokens(
                *tokenizers.tokenize(
                    self.qformer_tokenizer, text, questions, special=True, vocab=qformer.vocab
                )
            )
        )
        if len(qformer_row.ids) > qformer.positions:
            raise ValueError(
                f"the prompt has {len(qformer_row.ids)} tokens for the Q-Former, "
                f"which reads {qformer.positions} at most: {shown(text)}"
            )
        row.qformer_rows = [qformer_row] * len(pictures)
        return row

    def _assemble(self, encoded: list[Row], *rest) -> Batch:
        batch = super()._assemble(encoded, *rest)
        T = round_up_length(
            max((len(text.ids) for row in encoded for text in row.qformer_rows), default=0)
        )
        ids = np.zeros((len(batch.is_real_tile), T), np.int32)
        kind = np.full(ids.shape, tokens.CODE["pad"], np.int8)
        for at, row in zip(batch.image_token_index, encoded, strict=False):
            images = at[at >= 0][:: self.config.image_tokens] // self.config.image_tokens
            for image, text in zip(images, row.qformer_rows, strict=True):
                ids[image, : len(text)] = text.ids
                kind[image, : len(text)] = text.column("kind")
        return batch.replace(qformer_ids=ids, qformer_kind=kind)
