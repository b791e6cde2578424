"""Look up elements along a sharded axis without gathering the axis.

Each device searches its own part, and only the results are exchanged. If the axis is not sharded,
these functions are the plain operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mllm_jax.sharding import mesh
from mllm_jax.typing import Array, Float, Int


def top_k(
    x: Float[Array, "*B V"], k: int, local_top_k: Callable[[Array, int], tuple[Array, Array]]
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """Return the k largest elements along the vocabulary, and their indices.

    Args:
      x: The array; its first axis is sharded like rows.
      k: The number of elements.
      local_top_k: The function for one device, which takes the first of equal values.
    """
    axes, rows = mesh.axes_for("V", x.shape[-1]), mesh.axes_for("B", x.shape[0])
    if not axes and not rows:
        return local_top_k(x, k)

    def local(x):
        best, ids = local_top_k(x, min(k, x.shape[-1]))
        if not axes:
            return best, ids
        ids = ids + x.shape[-1] * jax.lax.axis_index(axes)
        best, ids = (jax.lax.all_gather(a, axes, axis=a.ndim - 1, tiled=True) for a in (best, ids))
        best, order = jax.lax.top_k(best, k)
        return best, jnp.take_along_axis(ids, order, -1)

    lead = (rows, *(None,) * (x.ndim - 2))
    return _shard_map(local, {*(axes or ()), *(rows or ())}, P(*lead, axes), P(*lead, None))(x)


def take_along_vocabulary(x: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Return the element of x at one id for each row."""
    if mesh.axes_for("V", x.shape[-1]) is None:
        return jnp.take_along_axis(x, ids[..., None], -1)[..., 0]
    return jnp.where(jnp.arange(x.shape[-1]) == ids[..., None], x, 0).sum(-1)


def take_image_tokens(
    table: Float[Array, "n D"], index: Int[Array, "B T"], tiles: int, shared: bool = False
) -> Float[Array, "B T D"]:
    """Return table[index], reading the tokens of a row's own tiles on the device of the row.

    Args:
      table: n // tiles tokens of each tile, tile by tile, and then tokens that all rows share.
      index: The index in the table of each token of a row.
      tiles: The number of tiles I. Rows share images if their number does not divide I.
      shared: Whether rows share images although their number divides I.
    """
    rows = mesh.axes_for("B", len(index))
    if rows is None:
        return table[index]
    if shared or tiles % len(index):
        return mesh.constrain(table, (None, None))[index]
    count = len(table) // tiles * tiles

    def local(own, shared, index):
        own_index = index - len(own) * jax.lax.axis_index(rows)
        local_index = jnp.where(index < count, own_index, len(own) + index - count)
        return jnp.concatenate([own, shared])[local_index]

    run = _shard_map(local, set(rows), (P(rows), P(), P(rows)), P(rows))
    return run(table[:count], table[count:], index)


def _shard_map(
    fn: Callable[..., Any], axes: set[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    return jax.shard_map(
        fn, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )
