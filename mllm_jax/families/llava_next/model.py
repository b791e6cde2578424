"""LLaVA-NeXT (Liu et al. 2024): LLaVA that also reads tiles of a picture at higher resolution.

A picture is read twice: as one small square, the base, and at high resolution. The large picture is
fitted into the best resolution and cut into tiles of the size of the base. The LM reads the base,
then the large picture row by row, without its padding and with a newline after each row. This
depends only on the size of the picture, so it is arithmetic on indices: the network computes every
patch of every tile, and `Batch.image_token_index` selects the patches that the LM reads.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.batch import Batch, Layout
from mllm_jax.families.llava.model import Llava, LlavaConfig
from mllm_jax.models.clip import ClipConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.multimodal import ImageTokens, require_size
from mllm_jax.typing import Int

Size = tuple[int, int]  # height, width


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaNextConfig(LlavaConfig):
    """A LLaVA-NeXT model.

    Attributes:
      vision: As in `LlavaConfig`.
      projector: As in `LlavaConfig`.
      lm: As in `LlavaConfig`.
      image_token: As in `LlavaConfig`.
      pinpoints: The resolutions (height, width) at which a picture may be cut into tiles, multiples
        of the image size.
    """

    pinpoints: tuple[Size, ...] = (  # type: ignore[misc]  # a constant of other families
        (336, 672),
        (672, 336),
        (672, 672),
        (1008, 336),
        (336, 1008),
    )

    @classmethod
    def vicuna_7b(cls) -> LlavaNextConfig:
        """Return the config of LLaVA-NeXT with Vicuna 7B."""
        return cls.of(ClipConfig.vit_l_14_336(), DecoderConfig.vicuna_7b())

    @classmethod
    def vicuna_13b(cls) -> LlavaNextConfig:
        """Return the config of LLaVA-NeXT with Vicuna 13B."""
        return cls.of(ClipConfig.vit_l_14_336(), DecoderConfig.vicuna_13b())

    @classmethod
    def mistral_7b(cls) -> LlavaNextConfig:
        """Return the config of LLaVA-NeXT with Mistral 7B."""
        return cls.of(ClipConfig.vit_l_14_336(), DecoderConfig.mistral_7b())

    @classmethod
    def tiny(cls) -> LlavaNextConfig:
        """Return a config for tests."""
        pinpoints = ((24, 48), (48, 24), (48, 48), (72, 24), (24, 72))
        return cls.of(ClipConfig.tiny(), DecoderConfig.tiny(), image_token=95, pinpoints=pinpoints)

    @property
    def tiles(self) -> int:
        """The largest number of tiles of a picture."""
        side = self.vision.image_size
        return 1 + max((height // side) * (width // side) for height, width in self.pinpoints)

    @property
    def largest(self) -> Size:
        """The (height, width) of a picture with the largest number of image tokens."""
        return max(self.pinpoints, key=lambda size: len(self.layout(size).patches))

    def layout(self, size: Size | None = None) -> Layout:
        """Return the layout of a picture of this (height, width).

        Raises:
          ValueError: The size is not known.
        """
        size = require_size(size, "LLaVA-NeXT cuts a picture by its size")
        tiles, large = self.large_picture(size)
        lines = np.pad(large, ((0, 0), (0, 1)), constant_values=-1)
        patches = np.concatenate([np.arange(self.image_tokens), lines.reshape(-1)])
        return Layout(tiles, patches, tile_grid=self.tile_grid(size))

    def large_picture(self, size: Size) -> tuple[int, Int[np.ndarray, "row column"]]:
        """Return the number of tiles, and the patches of the large picture without padding.

        Args:
          size: The (height, width) of the picture.
        """
        side, each = self.token_grid, self.image_tokens
        rows, columns = self.tile_grid(size)
        tiles = each + np.arange(rows * columns * each)
        by_row = tiles.reshape(rows, columns, side, side).swapaxes(1, 2)
        large = by_row.reshape(rows * side, columns * side)
        return 1 + rows * columns, large[unpadded(size, large.shape)]

    def tile_grid(self, size: Size) -> Size:
        """Return the rows and columns of tiles that a picture of this (height, width) has."""
        rows, columns = best_resolution(size, self.pinpoints)
        return rows // self.vision.image_size, columns // self.vision.image_size

    def build(self, *, rngs: nnx.Rngs) -> LlavaNext:
        """Build the model with random weights."""
        return LlavaNext(self, rngs=rngs)


class LlavaNext(Llava):
    """LLaVA with one more image token: the newline."""

    def __init__(self, config: LlavaNextConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.lm.width
        self.newline = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,)))

    def images(self, batch: Batch, taps) -> ImageTokens:
        """Return the image tokens of all tiles, and the newline after them."""
        tiles = super().images(batch, taps).tokens
        return ImageTokens(jnp.concatenate([tiles, self.newline[...][None]]))


def best_resolution(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """Return the resolution that keeps the most pixels of a picture; the smallest among equals.

    Args:
      size: The (height, width) of the picture.
      pinpoints: The available resolutions.
    """
    height, width = size

    def worth(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = int(width * scale) * int(height * scale)
        return min(kept, width * height), -resolution[0] * resolution[1]

    return max(pinpoints, key=worth)


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
    """Return the rows and columns of a grid that show a centred picture, without the padding.

    Args:
      size: The (height, width) of the picture.
      grid: The numbers of rows and columns of patches.
    """
    (height, width), (rows, columns) = size, grid
    # Round to 7 decimals, then down, as in the training of the released models.
    if width / height > columns / rows:
        bar = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(bar, rows - bar), slice(columns)
    bar = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(rows), slice(bar, columns - bar)
