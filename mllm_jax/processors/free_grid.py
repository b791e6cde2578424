"""Processors of models that read pictures at their native resolution, padded to few lengths."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_jax.batch import Layout
from mllm_jax.models import free_grid
from mllm_jax.models.free_grid import FreeGridConfig
from mllm_jax.models.multimodal import require_size
from mllm_jax.processors.processor import Processor
from mllm_jax.processors.rows import Picture, Row, round_up_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class FreeGridProcessor(Processor, abc.ABC):
    """A processor of pictures that keep their size: patches, padded to a power of 2.

    Args:
      tokenizer: See `Processor`.
      pictures: See `Processor`.
      config: The model's config.
      directory: See `Processor`.
      max_pixels: The largest number of pixels of a picture; larger ones are scaled down. None means
        the checkpoint's setting.
      **options: Further arguments of `Processor`.
    """

    config: FreeGridConfig

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pictures: Callable[[], Any],
        config: FreeGridConfig,
        directory: str | os.PathLike | None = None,
        *,
        max_pixels: int | None = None,
        **options: Any,
    ):
        def make() -> Any:
            image_processor = pictures()
            if max_pixels is not None:
                self._limit_pixels(image_processor, max_pixels)
            return image_processor

        if max_pixels is not None and max_pixels < (config.patch_side * config.merge) ** 2:
            raise ValueError(f"max_pixels={max_pixels} is less than the pixels of one image token")
        super().__init__(tokenizer, make, config, directory, **options)

    def _limit_pixels(self, image_processor: Any, most: int) -> None:
        """Set the largest number of pixels to which the image processor scales a picture."""
        raise ValueError(f"max_pixels={most}: this family has no such setting")

    @abc.abstractmethod
    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of a picture of this (height, width)."""

    @abc.abstractmethod
    def _patches(self, images: list[Any]) -> list[np.ndarray]:
        """Return the patches of each picture, float32[rows * columns, pixel], square by square."""

    def _check_image_processor(self, image_processor: Any) -> None:
        """Accept any size: the grid of a picture follows from it."""

    def layout(self, size: tuple[int, int] | None) -> Layout:
        """Return the layout of a picture of this (height, width).

        Raises:
          ValueError: The size is not known, and the layout depends on it.
        """
        size = require_size(size, "this model reads a picture at its native resolution")
        return self.config.layout_of_grid(self.patch_grid(size))

    def feature_places(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return the padded number P of vision features of pictures of these (height, width)."""
        return self._places(map(self.patch_grid, set(sizes)))

    def _places(self, grids: Iterable[tuple[int, int]]) -> int:
        """Return the padded number of patches of pictures with these grids."""
        most = max((rows * columns for rows, columns in grids), default=0)
        return free_grid.places(most, self.config.merge)

    def _are_places(self, given: int, needed: int) -> bool:
        # Features of a data set are padded to its largest picture.
        return given >= needed and given % self.config.merge**2 == 0

    def _tile_tokens(self, pictures: list[list[Picture]], features: np.ndarray | None) -> int:
        if features is not None:
            return features.shape[1] // self.config.merge**2
        return self._places(_grids(pictures)) // self.config.merge**2

    def _padded_length(self, encoded: list[Row], image_places: int, length: int | None) -> int:
        # One row length for each padded length of pictures, to compile few programs.
        text = max(sum(not token.is_image for token in row.tokens) for row in encoded)
        longest = image_places + round_up_length(text)
        return super()._padded_length(encoded, image_places, length or longest)

    def _grids(self, pictures: list[list[Picture]], tiles: int) -> np.ndarray:
        grids = np.zeros((len(pictures), tiles, 2), np.int32)
        for slot, row in zip(grids, pictures, strict=True):
            for place, picture in zip(slot, row, strict=False):
                place[:] = picture.layout.grid
        return grids.reshape(-1, 2)

    def _pixels(
        self, pictures: list[list[Picture]], tiles: int, read: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        real = self._real_tiles(pictures, tiles)
        flat = [picture for row in pictures for picture in row]
        places = self._places(_grids(pictures)) if read else 0
        pixels = np.zeros((len(real), places, self.config.patch_width), np.float32)
        if read and flat:
            patches = self._patches([picture.image for picture in flat])
            for place, picture in zip(np.flatnonzero(real), patches, strict=True):
                pixels[place, : len(picture)] = picture
        return pixels, real


def _grids(pictures: list[list[Picture]]) -> list[tuple[int, int]]:
    """Return the rows and columns of patches of each picture."""
    grids = (picture.layout.grid for row in pictures for picture in row)
    return [grid for grid in grids if grid is not None]
