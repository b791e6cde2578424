"""Idefics3 (Laurençon et al. 2024): SigLIP on tiles, one linear map and a Llama.

A picture is scaled to a size of whole tiles and cut; its tokens are those of the tiles, row by row,
followed by those of the whole picture, scaled to one tile. SmolVLM (Marafioti et al. 2025) is the
same network.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Self

import numpy as np

from mllm_jax.batch import Layout
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.multimodal import Size
from mllm_jax.models.projector import ProjectorConfig
from mllm_jax.models.rotary import RopeScaling
from mllm_jax.models.siglip import SiglipConfig

MAX_SIDE = 4096  # of a picture that is scaled, before it is cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idefics3Config(LlavaConfig):
    """An Idefics3 model; see `MultimodalConfig`.

    Attributes:
      model_type: The `model_type` of its `config.json`.
      longest_tiles: The number of tiles along the longer side of a picture in the released image
        processors; that of a checkpoint may differ.
    """

    model_type: ClassVar[str] = "idefics3"
    longest_tiles: ClassVar[int] = 4

    vision: SiglipConfig
    image_token: int = 128257

    @classmethod
    def of(cls, vision: Any, lm: DecoderConfig, *, fold: int = 2, **fields: Any) -> Self:
        """Return an Idefics3 of a tower and a language model, with the linear map between them."""
        projector = ProjectorConfig(
            in_width=vision.width, out_width=lm.width, depth=1, bias=False, fold=fold
        )
        return cls(vision=vision, projector=projector, lm=lm, **fields)

    @classmethod
    def idefics3_8b(cls) -> Idefics3Config:
        """Return the config of Idefics3 8B, with Llama 3.1."""
        scaling = RopeScaling(kind="llama3", factor=8.0, original_length=8192)
        lm = dataclasses.replace(DecoderConfig.llama3_8b(), vocab=128259, rope_scaling=scaling)
        vision = dataclasses.replace(SiglipConfig.so400m_14_384(), image_size=364)
        return cls.of(vision, lm)

    @classmethod
    def smolvlm_256m(cls) -> Self:
        """Return the config of SmolVLM 256M."""
        lm = dataclasses.replace(_smollm2_135m(), vocab=49280)
        return cls.of(_base_16_512(), lm, fold=4, image_token=49190)

    @classmethod
    def smolvlm_500m(cls) -> Self:
        """Return the config of SmolVLM 500M."""
        lm = dataclasses.replace(
            _smollm2_135m(), vocab=49280, width=960, layers=32, heads=15, kv_heads=5, mlp=2560
        )
        return cls.of(_base_16_512(), lm, fold=4, image_token=49190)

    @classmethod
    def smolvlm_2b(cls) -> Self:
        """Return the config of SmolVLM 2.2B."""
        vision = SiglipConfig.so400m_14_384()
        lm = DecoderConfig(
            vocab=49155, width=2048, layers=24, heads=32, kv_heads=32, head_width=64, mlp=8192,
            rope_theta=273768.0,
        )  # fmt: skip
        return cls.of(vision, lm, fold=3, image_token=49153)

    @classmethod
    def tiny(cls) -> Self:
        """Return a config for tests."""
        lm = DecoderConfig.tiny()
        return cls.of(SiglipConfig.tiny(), lm, fold=2, image_token=95)

    @property
    def tiles(self) -> int:
        """The largest number of tiles of a picture."""
        return self.layout(self.largest).tiles

    @property
    def largest(self) -> Size:
        """The (height, width) of a picture with the largest number of tokens."""
        return (self.longest_tiles * self.vision.image_size,) * 2

    def layout(self, size: Size | None = None) -> Layout:
        """Return the layout of a picture of this (height, width); None for a square."""
        side = self.vision.image_size
        return self.layout_of_tiles(
            tile_grid(size or self.largest, side, self.longest_tiles * side)
        )

    def layout_of_tiles(self, grid: Size) -> Layout:
        """Return the layout of a picture that is cut into these rows and columns of tiles."""
        tiles = grid[0] * grid[1] + 1  # the last is the whole picture
        tokens = self.image_tokens
        index = np.arange(tiles * tokens)
        return Layout(tiles, index, runs=(tokens,) * tiles, tile_grid=grid, whole=tiles - 1)


def tile_grid(size: Size, side: int, longest: int | None) -> Size:
    """Return the rows and columns of tiles that a picture is cut into; 0, 0 if it is not cut.

    Args:
      size: The (height, width) of the picture.
      side: The side of a tile.
      longest: The length to which the longer side is scaled first; None to keep it.
    """
    height, width = size
    if longest is not None:
        height, width = _within(_scaled(height, width, longest))
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / side)
        rows = math.ceil(int(columns * side / ratio) / side)
    else:
        rows = math.ceil(height / side)
        columns = math.ceil(int(rows * side * ratio) / side)
    return (rows, columns) if max(rows, columns) > 1 else (0, 0)


def _scaled(height: int, width: int, longest: int) -> Size:
    """Return the size whose longer side is `longest`; the other one is made even."""
    ratio = width / height
    if width >= height:
        shorter = int(longest / ratio)
        return max(shorter + shorter % 2, 1), longest
    shorter = int(longest * ratio)
    return longest, max(shorter + shorter % 2, 1)


def _within(size: Size) -> Size:
    """Return a size whose sides are at most `MAX_SIDE`."""
    height, width = size
    ratio = width / height
    if width >= height and width > MAX_SIDE:
        height, width = int(MAX_SIDE / ratio), MAX_SIDE
    elif height > width and height > MAX_SIDE:
        height, width = MAX_SIDE, int(MAX_SIDE * ratio)
    return max(height, 1), max(width, 1)


def _base_16_512() -> SiglipConfig:
    """Return the config of SigLIP base/16 at 512 pixels."""
    return SiglipConfig(width=768, layers=12, heads=12, mlp=3072, image_size=512, patch=16)


def _smollm2_135m() -> DecoderConfig:
    return dataclasses.replace(DecoderConfig.smollm2_135m(), tied=False)
