"""The processor of models that read only text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_jax.processors.processor import Processor
from mllm_jax.processors.rows import Picture


class TextProcessor(Processor):
    """A tokenizer and a chat template; a picture is refused."""

    image_text = ""

    def picture_settings(self) -> list[Any]:
        """Return nothing: there are no pictures."""
        return []

    def _read_pictures(
        self,
        images: Any,
        features: np.ndarray | None,
        sizes: Sequence[tuple[int, int] | None] | None,
        rows: int,
    ) -> list[list[Picture]]:
        if features is not None or sizes is not None or not _is_empty(images):
            raise ValueError("this model reads only text: give images=None")
        return [[] for _ in range(rows)]


def _is_empty(images: Any) -> bool:
    """Return whether an images argument has no picture: None, or a list of empty lists."""
    if images is None:
        return True
    return isinstance(images, (list, tuple)) and all(map(_is_empty, images))
