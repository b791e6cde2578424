"""Attention on each key, and attention as maps over pictures."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.numerics.precision import at_least_float32
from mllm_jax.tokens import CODE, TokenMap
from mllm_jax.typing import AnyArray, Array, Float


def read_attention(
    capture: BoundCapture, x: Float[Array, "B N T S"], lens: Callable | None
) -> Float[Array, "B N S"]:
    """Return the attention that the selected queries of each row pay to each key, on average."""
    selected = jnp.asarray(capture.tokens).astype(jnp.float32)
    total = jnp.einsum(
        "BNTS,BT->BNS", at_least_float32(x), selected, precision=jax.lax.Precision.HIGHEST
    )
    count = selected.sum(-1)
    # A tile without a selected token, or a row that only fills up the batch, is 0.
    return total / jnp.maximum(count, 1)[:, None, None]


def picture_maps(
    values: Float[AnyArray, "*L T"], tokens: TokenMap, row: int
) -> dict[int, Float[np.ndarray, "*L rows columns"]]:
    """Return values of the tokens of one row as maps over its pictures, by tile.

    Args:
      values: One value for each token of the row: attention on each key, an attribution, the
        entropy of a lens; with any axes before.
      tokens: The token map of the batch: `batch.tokens`, or that of another module.
      row: The row of the batch, or the tile of a module of tiles.

    Returns:
      For each tile, float[..., rows, columns] on the grid of its image tokens, NaN where the model
      reads none.

    Raises:
      ValueError: The values are not of as many tokens.
    """
    values = np.asarray(values)
    length = tokens.kind.shape[1]
    if values.shape[-1] != length:
        raise ValueError(
            f"values of {values.shape[-1]} tokens, but a row of the batch has {length}: give one "
            "value for each token, such as the keys of an attention"
        )
    kind, tile, down, across = (
        np.asarray(array)[row] for array in (tokens.kind, tokens.tile, tokens.row, tokens.column)
    )
    on_grid = (kind == CODE["image"]) & (down >= 0)
    maps = {}
    for number in np.unique(tile[on_grid]).tolist():
        own = np.flatnonzero(on_grid & (tile == number))
        shape = down[own].max() + 1, across[own].max() + 1
        values_of_tile = np.full((*values.shape[:-1], *shape), np.nan, values.dtype)
        values_of_tile[..., down[own], across[own]] = values[..., own]
        maps[number] = values_of_tile
    return maps
