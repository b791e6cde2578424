"""Grids of patches of any size: the position of each patch, and which patches attend to each other.

The pictures of a batch are padded to one number of patches, P. The rows x columns patches of a
picture come first, in blocks of m x m that are later merged into one token: block row, block
column, row within the block, column within the block. The rest is padding.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from mllm_jax.models import rotary
from mllm_jax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Places:
    """The positions of the patches of pictures.

    Attributes:
      row: The row of each patch.
      column: The column of each patch.
      valid: False for padding, whose row and column are arbitrary.
    """

    row: Int[Array, "I P"]
    column: Int[Array, "I P"]
    valid: Bool[Array, "I P"]

    @classmethod
    def of(cls, grid: Int[Array, "I 2"], count: int, merge: int) -> Places:
        """Return the positions of the patches of pictures.

        Args:
          grid: The rows and columns of patches of each picture; 0, 0 for none.
          count: The padded number of patches P.
          merge: The side m of a block.
        """
        number = jnp.arange(count, dtype=jnp.int32)
        block, within = number // merge**2, number % merge**2
        blocks_a_row = jnp.maximum(grid[:, 1:] // merge, 1)
        row = block // blocks_a_row * merge + within // merge
        column = block % blocks_a_row * merge + within % merge
        return cls(row, column, number < grid.prod(1, keepdims=True))

    @property
    def mask(self) -> Bool[Array, "I 1 1 P"]:
        """Which patches are attended to: all but padding."""
        return self.valid[:, None, None]

    def window_mask(self, side: int) -> Bool[Array, "I 1 P P"]:
        """Return which patches each patch attends to in windows of side x side patches."""
        row, column = self.row // side, self.column // side
        same = (row[:, :, None] == row[:, None]) & (column[:, :, None] == column[:, None])
        return same[:, None] & self.mask

    def rotation(
        self, row: Float[np.ndarray, " n"], column: Float[np.ndarray, " n"]
    ) -> rotary.Rotation:
        """Return cosine and sine of the angles of patches, in the layout of two halves.

        Args:
          row: The frequencies of the row; n is a quarter of the head width.
          column: The frequencies of the column.
        """
        position = jnp.stack([self.row, self.column])
        sections = rotary.RopeSections((len(row), len(column), 0))
        return rotary.rotation(position, np.concatenate([row, column]), sections)

    def interpolate(
        self, table: Float[Array, "places E"], grid: Int[Array, "I 2"]
    ) -> Float[Array, "I P E"]:
        """Return the entries of a square table, resized bilinearly with aligned corners.

        Args:
          table: One entry for each cell of a square, row by row.
          grid: The rows and columns of patches of each picture.
        """
        side = round(len(table) ** 0.5)
        rows = _between(self.row, grid[:, :1], side)
        columns = _between(self.column, grid[:, 1:], side)
        parts = (table[y * side + x] * (v * u)[..., None] for y, v in rows for x, u in columns)
        return sum(parts, jnp.zeros((), jnp.float32))


def _between(
    at: Int[Array, "I P"], count: Int[Array, "I 1"], side: int
) -> tuple[tuple[Int[Array, "I P"], Float[Array, "I P"]], ...]:
    """Return the two entries of an axis of the table around each patch, and their weights."""
    steps = jnp.maximum(count - 1, 1)
    distance = at * (side - 1)  # in integer fractions of a step, so that nothing is rounded
    low = jnp.clip(distance // steps, 0, side - 1)
    weight = (distance % steps).astype(jnp.float32) / steps
    return (low, 1 - weight), (jnp.minimum(low + 1, side - 1), weight)
