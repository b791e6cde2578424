"""The processor of the Qwen-VL models: a picture keeps its shape, within a number of pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mllm_jax import files
from mllm_jax.batch import Batch
from mllm_jax.families.qwen2_5_vl.model import QwenVLConfig
from mllm_jax.processors import image_processors
from mllm_jax.processors.free_grid import FreeGridProcessor

MAX_RATIO = 200  # of the longer side of a picture to the shorter
_TOKEN, _BEGIN, _END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"


class QwenVLProcessor(FreeGridProcessor):
    """A processor of a Qwen-VL checkpoint."""

    config: QwenVLConfig
    image_text = placeholder = _TOKEN
    written_placeholder = f"{_BEGIN}{_TOKEN}{_END}"
    markers = _BEGIN, _END
    video_text = "<|video_pad|>"

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of a picture of this (height, width)."""
        limits = self.image_processor.size
        factor = self.config.patch_side * self.config.merge
        height, width = resized(size, factor, limits["shortest_edge"], limits["longest_edge"])
        return height // self.config.patch_side, width // self.config.patch_side

    def _check_image_processor(self, image_processor: Any) -> None:
        vision, path = self.config.vision, f"{files.line(self.directory, 150)}"
        ours = {
            "patch_size": vision.patch,
            "temporal_patch_size": vision.frames,
            "merge_size": vision.merge,
            "do_resize": True,
        }
        theirs = {name: getattr(image_processor, name, None) for name in ours}
        if theirs != ours:
            raise ValueError(
                f"{path}/preprocessor_config.json: the image processor has {theirs}, and the model "
                f"reads {ours}: make them the same"
            )
        least, most = (image_processor.size[n] for n in ("shortest_edge", "longest_edge"))
        if not (least and most) or least > most:
            raise ValueError(
                f"{path}/preprocessor_config.json: size has shortest_edge={least} and "
                f"longest_edge={most}: give the smallest and largest number of pixels of a picture"
            )

    def _limit_pixels(self, image_processor: Any, most: int) -> None:
        size = image_processor.size
        size["longest_edge"] = most
        size["shortest_edge"] = min(size["shortest_edge"], most)

    def _patches(self, images: list[Any]) -> list[np.ndarray]:
        found = image_processors.prepare(self.image_processor, images, self.directory)
        counts = found["image_grid_thw"].prod(-1)
        return np.split(found["pixel_values"], np.cumsum(counts)[:-1])

    def _tile_pixels(self, batch: Batch, tile: int) -> np.ndarray:
        vision = self.config.vision
        assert batch.grid is not None  # the processor of this family gives the grids
        (rows, columns), merge, side = batch.grid[tile], vision.merge, vision.patch
        patches = np.asarray(batch.pixels[tile])[: rows * columns]
        squares = (rows // merge, columns // merge, merge, merge)
        pixels = patches.reshape(*squares, 3, vision.frames, side, side)[:, :, :, :, :, 0]
        # (square row and column, row and column in it, channel, row and column of the pixel)
        return pixels.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, 3)


def resized(size: tuple[int, int], factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the (height, width) that a picture is scaled to, both multiples of a factor.

    Args:
      size: The (height, width) of the picture.
      factor: The side of the square of pixels that becomes one token.
      least: The smallest number of pixels.
      most: The largest number of pixels; a picture of one row or column of tokens may exceed it.

    Raises:
      ValueError: The aspect ratio of the picture is too large.
    """
    height, width = size
    if max(size) > MAX_RATIO * min(size):
        raise ValueError(
            f"a picture of {width} x {height} (width x height) has one side more than {MAX_RATIO} "
            "times as long as the other: crop it"
        )
    rows, columns = (round(side / factor) * factor for side in size)  # half to even
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(factor, math.floor(n / shrink / factor) * factor) for n in size)
        return rows, columns
    if rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(n * grow / factor) * factor for n in size)
    return rows, columns
