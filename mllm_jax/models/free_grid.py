"""Models that read pictures at native resolution: a grid of patches, padded to few lengths."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from flax import nnx

from mllm_jax import tokens
from mllm_jax.batch import Batch, Layout
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel, Size
from mllm_jax.typing import Array, Float, Int

# Smaller pictures are padded to this number of patches, larger ones to a power of 2: eight lengths
# up to the largest picture of the Qwen-VL models.
MIN_PLACES = 512


def places(patches: int, merge: int) -> int:
    """Return the padded number of patches for pictures of at most this many patches.

    Args:
      patches: The number of patches.
      merge: The side of the square of patches that becomes one token; only whole squares occur.
    """
    power = max(MIN_PLACES, 2 ** max(0, patches - 1).bit_length()) if patches else 0
    return -(-power // merge**2) * merge**2


class FreeGridTower(Protocol):
    """A vision tower that reads patches of pictures of any size."""

    def __call__(
        self, patches: Float[Array, "I P pixel"], grid: Int[Array, "I 2"], tap
    ) -> Float[Array, "I P E"]:
        """Return the features; those of padding are arbitrary."""


class FreeGridTowerConfig(Protocol):
    """The config of such a tower."""

    @property
    def patch(self) -> int:
        """The side of a patch in pixels."""

    @property
    def merge(self) -> int:
        """The side of the square of patches that becomes one token."""

    @property
    def pixels(self) -> int:
        """The number of values of a patch."""

    def build(self, *, rngs: nnx.Rngs) -> FreeGridTower:
        """Build the tower with random weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeGridConfig(MultimodalConfig):
    """The config of a model that reads each picture at its native resolution.

    Each picture is one tile. Its patches are grouped in squares of `merge` x `merge`, each of which
    becomes one token of the language model.

    Attributes:
      vision: The vision tower.
      largest_grid: The rows and columns of patches of the largest picture.
    """

    vision: FreeGridTowerConfig  # type: ignore[assignment]  # other fields than squares have
    largest_grid: Size = (64, 64)

    @property
    def merge(self) -> int:
        """The side of the square of patches that becomes one token."""
        return self.vision.merge

    @property
    def patch_side(self) -> int:
        """The side of a patch in pixels."""
        return self.vision.patch

    @property
    def patch_width(self) -> int:
        """The number of values of a patch, of all its frames."""
        return self.vision.pixels

    @property
    def image_tokens(self) -> int:
        """The padded number of tokens of the largest picture."""
        return self.pixel_shape[0] // self.merge**2

    @property
    def tile_side(self) -> None:
        """None, because each picture has its own size."""

    @property
    def pixel_shape(self) -> Size:
        """The shape of the patches of the largest picture."""
        rows, columns = self.largest_grid
        return places(rows * columns, self.merge), self.patch_width

    @property
    def token_grid(self) -> int:
        """0, because each picture has its own grid."""
        return 0

    @property
    def largest(self) -> Size:
        """The (height, width) of the largest picture."""
        rows, columns = self.largest_grid
        return rows * self.patch_side, columns * self.patch_side

    def tile_tokens(self, batch: Batch) -> int:
        """Return the padded number of tokens of each picture of a batch in the LM."""
        patches = batch.pixels if batch.features is None else batch.features
        return patches.shape[1] // self.merge**2

    def layout(self, size: Size | None = None) -> Layout:
        """Return the layout of an image of this (height, width), multiples of merged patches."""
        rows, columns = size or self.largest
        return self.layout_of_grid((rows // self.patch_side, columns // self.patch_side))

    def layout_of_grid(self, grid: Size) -> Layout:
        """Return the layout of a picture with these rows and columns of patches."""
        rows, columns = (n // self.merge for n in grid)
        index = np.arange(rows * columns)
        places = np.stack(np.divmod(index, max(columns, 1)), 1)
        return Layout(1, index, places=places, grid=grid)


class FreeGridModel(MultimodalModel):
    """A network that reads each picture at its native resolution."""

    config: FreeGridConfig
    vision: FreeGridTower  # type: ignore[assignment]  # reads grids beside patches

    def token_maps(self, batch: Batch) -> dict[str, tokens.TokenMap]:
        """Return the token map of each module: vision [I, P], projector [I, P], LM [B, T]."""
        assert batch.grid is not None, "the processor of this family gives the grids"
        merge, places = self.config.merge, self.config.tile_tokens(batch)
        maps = {
            "vision": tokens.TokenMap.free_grid(batch.tile, batch.grid, places * merge**2, merge),
            "projector": tokens.TokenMap.free_grid(batch.tile, batch.grid // merge, places),
        }
        return self.with_readers(batch, maps) | dict.fromkeys(("lm", "logits"), batch.tokens)
