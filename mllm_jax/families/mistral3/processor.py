"""The processor of Mistral 3 and Pixtral: a picture keeps its shape, up to a longest side."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mllm_jax import files
from mllm_jax.batch import Batch
from mllm_jax.families.mistral3.model import Mistral3Config
from mllm_jax.processors import image_processors
from mllm_jax.processors.free_grid import FreeGridProcessor
from mllm_jax.processors.rows import Picture

_IMAGE, _BREAK, _END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"


class Mistral3Processor(FreeGridProcessor):
    """A processor of a checkpoint of Mistral 3, or of Pixtral in LLaVA's format."""

    config: Mistral3Config
    image_text = placeholder = written_placeholder = _IMAGE
    markers = _BREAK, _END

    @property
    def _factor(self) -> int:
        """The side of the square of pixels that becomes one token."""
        return self.config.patch_side * self.config.merge

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of a picture of this (height, width).

        Raises:
          ValueError: The aspect ratio of the picture is too large.
        """
        height, width = size
        most = _limits(self.image_processor.size)
        ratio = max(height / most[0], width / most[1])
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if not (height and width):
            raise ValueError(
                f"a picture of {size[1]} x {size[0]} (width x height) has no row or column of "
                f"pixels left when its longer side is {max(most)}: crop it"
            )
        rows, columns = ((side - 1) // self._factor + 1 for side in (height, width))
        return rows * self.config.merge, columns * self.config.merge

    def picture_text(self, picture: Picture) -> str:
        """Return the text of a picture: image tokens row by row, each with its end token."""
        return _BREAK.join([_IMAGE] * len(picture.layout.runs)) + _END

    def _check_image_processor(self, image_processor: Any) -> None:
        path = f"{files.line(self.directory, 150)}/preprocessor_config.json"
        if not image_processor.do_resize or getattr(image_processor, "do_center_crop", False):
            raise ValueError(
                f"{path}: do_resize must be true and do_center_crop false: this model reads whole "
                "pictures of whole patches"
            )
        if None in _limits(image_processor.size):
            raise ValueError(f"{path}: size={image_processor.size} has no longest_edge")

    def _patches(self, images: list[Any]) -> list[np.ndarray]:
        return [self._patches_of(image) for image in images]

    def _patches_of(self, image: Any) -> np.ndarray:
        made = image_processors.prepare(
            self.image_processor, [image], self.directory, patch_size=self._factor
        )
        pixels, merge, side = made["pixel_values"][0], self.config.merge, self.config.patch_side
        rows, columns = (n // self._factor for n in pixels.shape[1:])
        # (channel, square row, row in it, row of the pixel, and the same of columns)
        x = pixels.reshape(3, rows, merge, side, columns, merge, side)
        return x.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, self.config.patch_width)

    def _tile_pixels(self, batch: Batch, tile: int) -> np.ndarray:
        assert batch.grid is not None  # the processor of this family gives the grids
        merge, side = self.config.merge, self.config.patch_side
        rows, columns = (int(n) // merge for n in batch.grid[tile])
        patches = np.asarray(batch.pixels[tile])[: rows * columns * merge**2]
        x = patches.reshape(rows, columns, merge, merge, 3, side, side)
        return x.transpose(0, 2, 5, 1, 3, 6, 4).reshape(
            rows * self._factor, columns * self._factor, 3
        )


def _limits(size: Any) -> tuple[Any, Any]:
    """Return the largest height and width of a size setting of transformers."""
    longest, height, width = (
        getattr(size, name, None) for name in ("longest_edge", "height", "width")
    )
    return (longest, longest) if longest else (height, width)
