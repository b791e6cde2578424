"""Layers and rows of bfloat16 arrays, without a float32 copy of the whole array.

XLA on CPU indexes no bfloat16: it converts the array to float32 and indexes that. In a loop, where
the array is the same every time, the conversion then moves out of the loop, and all layers of a
model exist once more at twice their size. A barrier that waits for the index keeps the conversion
inside, where it becomes one with the indexing and touches only what is asked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def layer_indices(stack: Any) -> jax.Array | None:
    """int32[L], for a scan that calls `at`; None where `at` needs no index.

    Args:
      stack: arrays that lead with L.
    """
    leaves = jax.tree.leaves(stack)
    return jnp.arange(len(leaves[0]), dtype=jnp.int32) if any(map(_is_narrow, leaves)) else None


def index_without_upcast(taken: Any, whole: Any, index: Any) -> Any:
    """What was taken of arrays. On CPU, of floats narrower than float32, it is taken here.

    Args:
      taken: whole[index], in any way. Gradients go through this; it is not computed for more.
      whole: arrays, indexed on their first axis.
      index: int32[...].
    """
    leaves, tree = jax.tree.flatten(taken)
    narrow = [n for n, leaf in enumerate(leaves) if _is_narrow(leaf)]
    if not narrow:
        return taken
    arrays = jax.tree.leaves(whole)
    found = _at([leaves[n] for n in narrow], [arrays[n] for n in narrow], index)
    for n, leaf in zip(narrow, found, strict=True):
        leaves[n] = leaf
    return jax.tree.unflatten(tree, leaves)


@jax.custom_jvp
def _at(taken: list, whole: list, index) -> list:
    def behind_barrier(taken, whole, index):
        whole, index = jax.lax.optimization_barrier((whole, index))
        return [array[index] for array in whole]

    return jax.lax.platform_dependent(
        taken, whole, index, cpu=behind_barrier, default=lambda taken, *_: taken
    )


@_at.defjvp
def _(primals, tangents):
    return _at(*primals), tangents[0]


def _is_narrow(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
