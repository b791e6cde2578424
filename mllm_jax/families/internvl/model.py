"""InternVL 3 and 3.5 (Zhu et al. 2025): a LLaVA with an InternViT, of pictures cut into tiles.

A picture is stretched to the grid of tiles whose aspect ratio is nearest to its own. If there are
several tiles, the whole picture follows as the last tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np

from mllm_jax.batch import Layout
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.internvit import InternVitConfig
from mllm_jax.models.multimodal import Size, require_size
from mllm_jax.models.projector import ProjectorConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVlConfig(LlavaConfig):
    """An InternVL model.

    Attributes:
      vision, projector, lm, image_token: As in `LlavaConfig`.
      min_tiles: The smallest number of tiles that a picture is cut into.
      max_tiles: The largest number, without the tile of the whole picture.
    """

    vision: InternVitConfig  # type: ignore[assignment]  # another tower
    image_token: int = 151667
    min_tiles: int = 1
    max_tiles: int = 12

    @property
    def tiles(self) -> int:
        """The largest number of tiles of a picture."""
        return self.max_tiles + (self.max_tiles > 1)

    @property
    def largest(self) -> Size:
        """The (height, width) of a picture with the largest number of tiles."""
        side = self.vision.image_size
        return side, side * self.max_tiles

    def layout(self, size: Size | None = None) -> Layout:
        """Return the layout of a picture of this (height, width).

        Raises:
          ValueError: The size is not known, and the number of tiles depends on it.
        """
        if self.max_tiles == 1:
            return super().layout(size)
        rows, columns = self.tile_grid(require_size(size, "InternVL cuts a picture by its size"))
        if rows * columns == 1:
            return super().layout(size)
        tiles = rows * columns + 1  # the last is the whole picture
        index = np.arange(tiles * self.image_tokens)
        return Layout(tiles, index, tile_grid=(rows, columns), whole=tiles - 1)

    def tile_grid(self, size: Size) -> Size:
        """Return the rows and columns of tiles of a picture: the grid nearest in aspect ratio.

        Among grids of equal aspect ratio, a larger one is used only if the picture has more than
        half of its pixels.
        """
        height, width = size
        numbers = range(1, self.max_tiles + 1)
        grids = sorted(
            (
                (rows, columns)
                for columns in numbers
                for rows in numbers
                if self.min_tiles <= rows * columns <= self.max_tiles
            ),
            key=lambda grid: grid[0] * grid[1],
        )
        best, least = (1, 1), float("inf")
        for rows, columns in grids:
            far = abs(width / height - columns / rows)
            half = 0.5 * self.vision.image_size**2 * rows * columns
            if far < least or (far == least and width * height > half):
                best, least = (rows, columns), far
        return best

    @classmethod
    def of(  # type: ignore[override]  # another tower
        cls, vision: InternVitConfig, lm: DecoderConfig, *, fold: int = 2, act: str = "gelu",
        **fields: Any,
    ) -> Self:  # fmt: skip
        """Return an InternVL of a tower and a language model; fold x fold patches are one token."""
        projector = ProjectorConfig.shuffled(vision.width, lm.width, fold=fold, act=act)
        return cls(vision=vision, projector=projector, lm=lm, **fields)

    @classmethod
    def tiny(cls) -> InternVlConfig:
        """Return a config for tests."""
        lm = dataclasses.replace(DecoderConfig.tiny(), biases="qkv")
        return cls.of(InternVitConfig.tiny(), lm, image_token=95, max_tiles=4)


def version_3(**lm: Any) -> InternVlConfig:
    """Return the config of InternVL 3 with a Qwen2.5; `lm` are its sizes."""
    known = {"vocab": 151674, "tied": False} | lm
    lm_ = dataclasses.replace(DecoderConfig.qwen2_7b(), **known)
    return InternVlConfig.of(InternVitConfig.internvit_300m(), lm_)


def version_3_5(**lm: Any) -> InternVlConfig:
    """Return the config of InternVL 3.5 with a Qwen3; `lm` are its sizes."""
    shared: dict[str, Any] = {"kv_heads": 8, "qk_norm": True, "rope_theta": 1e6, "eps": 1e-6}
    return InternVlConfig.of(
        InternVitConfig.internvit_300m(), DecoderConfig(vocab=151936, **shared | lm)
    )


def with_6b(config: InternVlConfig) -> InternVlConfig:
    """Return a config with the larger InternViT."""
    return InternVlConfig.of(InternVitConfig.internvit_6b(), config.lm)
