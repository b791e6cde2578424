"""Look-ups along an axis that is split, without gathering the axis.

Each device looks among what it holds, and only what was found is exchanged. Where the axis is not
split these are the plain operations.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mllm_jax.sharding import mesh
from mllm_jax.typing import Array, Float, Int


def top_k(
    x: Float[Array, "*B V"], k: int, whole: Callable[[Array, int], tuple[Array, Array]]
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """The k largest of a vocabulary: those of each part, and of these the largest.

    Args:
        x: its first axis is split as rows are.
        k: how many.
        whole: what finds them where all are on one device; of equal values it takes the first.
    """
    axes, rows = mesh.axes_for("V", x.shape[-1]), mesh.axes_for("B", x.shape[0])
    if not axes and not rows:
        return whole(x, k)

    def local(x):
        best, ids = whole(x, min(k, x.shape[-1]))
        if not axes:
            return best, ids
        ids = ids + x.shape[-1] * jax.lax.axis_index(axes)
        best, ids = (jax.lax.all_gather(a, axes, axis=a.ndim - 1, tiled=True) for a in (best, ids))
        best, at = jax.lax.top_k(best, k)
        return best, jnp.take_along_axis(ids, at, -1)

    lead = (rows, *(None,) * (x.ndim - 2))
    return _shard_map(local, {*(axes or ()), *(rows or ())}, P(*lead, axes), P(*lead, None))(x)


def take_along_vocabulary(x: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Return the value of x at one id of each row."""
    if mesh.axes_for("V", x.shape[-1]) is None:
        return jnp.take_along_axis(x, ids[..., None], -1)[..., 0]
    return jnp.where(jnp.arange(x.shape[-1]) == ids[..., None], x, 0).sum(-1)


def take_image_tokens(
    table: Float[Array, "n D"], at: Int[Array, "B T"], tiles: int
) -> Float[Array, "B T D"]:
    """table[at], where the tokens of a row's own tiles stand in the part that has the row.

    Args:
        table: n // tiles tokens of each tile, tile after tile; what comes after all of them is
            the same for every row.
        at: of each place in a row.
        tiles: I, as many for each row, or else rows share them.
    """
    rows = mesh.axes_for("B", len(at))
    if rows is None:
        return table[at]
    if tiles % len(at):  # rows share pictures
        return mesh.constrain(table, (None, None))[at]
    count = len(table) // tiles * tiles

    def local(own, shared, at):
        here = at - len(own) * jax.lax.axis_index(rows)
        here = jnp.where(at < count, here, len(own) + at - count)
        return jnp.concatenate([own, shared])[here]

    run = _shard_map(local, set(rows), (P(rows), P(), P(rows)), P(rows))
    return run(table[:count], table[count:], at)


def _shard_map(fn: Callable, axes: set[str], in_specs, out_specs) -> Callable:
    return jax.shard_map(
        fn, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )
