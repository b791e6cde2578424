"""The processor of LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm_jax.batch import Layout
from mllm_jax.families.llava_onevision.model import LlavaOneVisionConfig
from mllm_jax.processors import image_processors
from mllm_jax.processors.packed_tiles import PackedTilesProcessor
from mllm_jax.processors.rows import Picture


class LlavaOneVisionProcessor(PackedTilesProcessor):
    """A processor that cuts a picture into tiles if it is alone in its row."""

    config: LlavaOneVisionConfig
    video_text = "<video>"

    def layouts(self, sizes: Sequence[tuple[int, int] | None]) -> list[Layout]:
        """Return the layouts of the pictures of a row, of these (height, width)."""
        return self.config.layouts(sizes)

    def _tiles(self, pictures: list[Picture]) -> list[np.ndarray]:
        beside = [picture.image for picture in pictures if picture.layout.tiles == 1]
        squares = iter(self._preprocess_row(beside)[:, 0]) if beside else iter(())
        return [
            next(squares)[None]
            if picture.layout.tiles == 1
            else self._preprocess_row([picture.image])[0]
            for picture in pictures
        ]

    def _preprocess_row(self, images: list) -> np.ndarray:
        """Return float[n, tiles, 3, row, column], the tiles of the pictures of one row."""
        side = self.config.vision.image_size
        return image_processors.preprocess(self.image_processor, [images], side, self.directory)
