"""The processor of LLaVA-OneVision."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mllm_jax.batch import Layout
from mllm_jax.families.llava_onevision.model import LlavaOneVisionConfig
from mllm_jax.processors import image_processors
from mllm_jax.processors.processor import Processor
from mllm_jax.processors.rows import Picture

# Rows are given one of these numbers of places for tiles, so that batches share a few programs.
_TILES = (1, 2, 3, 4, 5, 7, 10, 13, 17, 25, 37, 50, 75, 100)


class LlavaOneVisionProcessor(Processor):
    """A processor that cuts a picture into tiles where it is alone in its row.

    The tiles of a row stand side by side, and a row has as many places for tiles as it needs.
    """

    config: LlavaOneVisionConfig

    def layouts(self, sizes: Sequence[tuple[int, int] | None]) -> list[Layout]:
        """Return how the pictures of a row, of these (height, width), are read."""
        return self.config.layouts(sizes)

    def first_tiles(self, layouts: Sequence[Layout]) -> list[int]:
        """Return the number of the first tile of each picture of a row."""
        counts = [layout.tiles for layout in layouts]
        return list(itertools.accumulate(counts, initial=0))[: len(counts)]

    def _slot_tiles(self, pictures: list[list[Picture]], features: np.ndarray | None) -> int:
        if features is not None:
            return super()._slot_tiles(pictures, features)
        most = max((sum(p.layout.tiles for p in row) for row in pictures), default=0)
        if not most:
            return 0
        places = next((n for n in _TILES if n >= most), most)
        return min(places, self.config.tiles) if most <= self.config.tiles else places

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
