"""Processors of models that cut pictures into very different numbers of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mllm_jax.batch import Layout
from mllm_jax.processors.processor import Processor
from mllm_jax.processors.rows import Picture

# Rows are padded to one of these numbers of tiles, so that batches share a few programs.
_TILES = (1, 2, 3, 4, 5, 7, 10, 13, 17, 25, 37, 50, 75, 100)


class PackedTilesProcessor(Processor):
    """A processor that packs the tiles of a row without gaps between pictures.

    A row is padded to the number of tiles that it needs, rounded up, instead of the largest number
    that its pictures could have.
    """

    def first_tiles(self, layouts: Sequence[Layout]) -> list[int]:
        """Return the number of the first tile of each picture of a row."""
        counts = [layout.tiles for layout in layouts]
        return list(itertools.accumulate(counts, initial=0))[: len(counts)]

    def feature_places(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return the padded number P of vision features of pictures of these (height, width)."""
        tiles = max((self.layout(size).tiles for size in set(sizes)), default=1)
        return tiles * self.config.vision.feature_tokens

    def _are_places(self, given: int, needed: int) -> bool:
        # Features of a data set are padded to its picture with the most tiles.
        return given >= needed and given % self.config.vision.feature_tokens == 0

    def _slot_tiles(self, pictures: list[list[Picture]], features: np.ndarray | None) -> int:
        if features is not None:
            return features.shape[1] // self.config.vision.feature_tokens if any(pictures) else 0
        most = max((sum(p.layout.tiles for p in row) for row in pictures), default=0)
        if not most:
            return 0
        places = next((n for n in _TILES if n >= most), most)
        return min(places, self.config.tiles) if most <= self.config.tiles else places
