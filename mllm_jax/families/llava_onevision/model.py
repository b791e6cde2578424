"""LLaVA-OneVision (Li et al. 2024): LLaVA-NeXT with SigLIP, and finer pictures.

A picture that is alone in its row is read as in LLaVA-NeXT, cut into up to 36 tiles. If these have
many more patches than `max_tiles` tiles, the large picture is downsampled after the projector: each
of its tokens is the sum of four patches with the weights of bilinear resizing. If a row has several
pictures, each of them is one tile.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from mllm_jax.batch import Layout
from mllm_jax.families.llava_next.model import LlavaNextConfig, Size
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.siglip import SiglipConfig
from mllm_jax.typing import Float, Int

_STEPS = range(384, 2305, 384)
_SHRINK = 1.1  # a picture is downsampled only if its side is longer by more than this factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaOneVisionConfig(LlavaNextConfig):
    """A LLaVA-OneVision model.

    Attributes:
      vision, projector, lm, image_token, pinpoints: As in `LlavaNextConfig`.
      max_tiles: The number of tiles whose patches a picture may have without being downsampled.
    """

    vision: SiglipConfig
    image_token: int = 151646
    pinpoints: tuple[Size, ...] = tuple((h, w) for h in _STEPS for w in _STEPS)  # type: ignore[misc]
    max_tiles: int = 9

    @classmethod
    def qwen2_0_5b(cls) -> LlavaOneVisionConfig:
        """Return the config of LLaVA-OneVision with Qwen2 0.5B."""
        return cls.of(_tower(), dataclasses.replace(DecoderConfig.qwen2_0_5b(), vocab=152000))

    @classmethod
    def qwen2_7b(cls) -> LlavaOneVisionConfig:
        """Return the config of LLaVA-OneVision with Qwen2 7B."""
        return cls.of(_tower(), dataclasses.replace(DecoderConfig.qwen2_7b(), vocab=152128))

    @classmethod
    def qwen2_72b(cls) -> LlavaOneVisionConfig:
        """Return the config of LLaVA-OneVision with Qwen2 72B."""
        return cls.of(_tower(), dataclasses.replace(DecoderConfig.qwen2_72b(), vocab=152128))

    @classmethod
    def tiny(cls) -> LlavaOneVisionConfig:
        """Return a config for tests."""
        vision = dataclasses.replace(SiglipConfig.tiny(), feature_layer=-1)
        lm = dataclasses.replace(DecoderConfig.tiny(), biases="qkv")
        pinpoints = tuple((h, w) for h in (24, 48, 72) for w in (24, 48, 72))
        return cls.of(vision, lm, image_token=95, pinpoints=pinpoints, max_tiles=3)

    @property
    def largest(self) -> Size:
        """The (height, width) of a picture with the largest number of image tokens."""
        return _largest(self)

    def layout(self, size: Size | None = None) -> Layout:
        """Return the layout of a picture of this (height, width) if it is alone in its row.

        Raises:
          ValueError: The size is not known, and the layout depends on it.
        """
        if size is None:
            return super().layout(size)
        tiles, large = self.large_picture(size)
        ratio = self.ratio(large)
        rows, columns = large.shape
        if ratio <= _SHRINK:
            return super().layout(size)
        index, weight = shrunk(large, (int(rows // ratio), int(columns // ratio)))
        newlines = np.full((len(index), 1, 4), -1)
        lines = np.concatenate([index, newlines], 1).reshape(-1, 4)
        weights = np.pad(weight, ((0, 0), (0, 1), (0, 0))).reshape(-1, 4)
        base = np.arange(self.image_tokens)
        alone = np.eye(1, 4, dtype=np.float32).repeat(len(base), 0)
        sources = np.concatenate([np.repeat(base[:, None], 4, 1), lines])
        weights = np.concatenate([alone, weights])
        nearest = np.take_along_axis(sources, weights.argmax(1)[:, None], 1)[:, 0]
        return Layout(
            tiles, nearest, tile_grid=self.tile_grid(size), interpolation=(sources, weights)
        )

    def ratio(self, large: Int[np.ndarray, "row column"]) -> float:
        """Return the factor by which the sides of a large picture exceed the limit."""
        return math.sqrt(large.size / (self.max_tiles * self.image_tokens))

    def layouts(self, sizes: Sequence[Size | None]) -> list[Layout]:
        """Return the layouts of the pictures of a row."""
        if len(sizes) == 1:
            return [self.layout(sizes[0])]
        return [Layout(1, np.append(np.arange(self.image_tokens), -1)) for _ in sizes]


def _tower() -> SiglipConfig:
    """Return the config of the tower of the released models, without its last block."""
    return dataclasses.replace(SiglipConfig.so400m_14_384(), layers=26, feature_layer=-1)


def shrunk(
    grid: Int[np.ndarray, "row column"], size: Size
) -> tuple[Int[np.ndarray, "h w 4"], Float[np.ndarray, "h w 4"]]:
    """Return the four values and weights of bilinear resizing at each point of a smaller grid.

    Args:
      grid: The values.
      size: The rows and columns of the smaller grid.
    """
    (top, bottom, down), (left, right, across) = (
        _neighbours(*pair) for pair in zip(grid.shape, size, strict=True)
    )
    down, across = down[:, None], across[None]
    index = [grid[np.ix_(r, c)] for r in (top, bottom) for c in (left, right)]
    weight = [v * h for v in (1 - down, down) for h in (1 - across, across)]
    return np.stack(index, -1), np.stack(weight, -1)


def _neighbours(
    length: int, smaller: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return the neighbours of each of fewer, evenly spaced points, and the weight of the second.

    Rounds to float32 where torch does, with align_corners=False.
    """
    step = np.float32(length) / np.float32(smaller)
    place = np.float64(step) * (np.arange(smaller) + 0.5) - 0.5
    place = np.maximum(place.astype(np.float32), np.float32(0))
    before = place.astype(int)
    return before, np.minimum(before + 1, length - 1), place - before.astype(np.float32)


@functools.lru_cache
def _largest(config: LlavaOneVisionConfig) -> Size:
    """Return the size with the most image tokens; it may have padding, to avoid downsampling."""
    side, patch = config.vision.image_size, config.vision.patch
    sizes = set(config.pinpoints)
    for height, width in config.pinpoints:
        for down, across in ((patch, 0), (0, patch)):
            cut = ((height - n * down, width - n * across) for n in range(side // patch))
            whole = (s for s in cut if config.ratio(config.large_picture(s)[1]) <= _SHRINK)
            sizes.update(itertools.islice(whole, 1))
    return max(sorted(sizes), key=lambda size: len(config.layout(size).patches))
