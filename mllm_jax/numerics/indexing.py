"""Index bfloat16 arrays without a float32 copy of the whole array.

Before jaxlib 0.12, XLA on CPU does not index bfloat16 arrays: it converts the array to float32 and
indexes the result. In a loop over one array the conversion is then hoisted out of the loop, so that
all layers of a model exist a second time at twice their size. An optimization barrier that depends
on the index keeps the conversion inside the loop, where XLA fuses it with the indexing and converts
only the elements that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mllm_jax.typing import Array, Int

Tree = TypeVar("Tree")


def layer_indices(stack: Any) -> Int[Array, " L"] | None:
    """Return the layer numbers for a scan that calls `index_without_upcast`.

    Args:
      stack: A pytree of arrays whose leading axis is L.

    Returns:
      int32[L], or None if no array is narrower than float32 and no index is needed.
    """
    leaves = jax.tree.leaves(stack)
    if not any(map(_is_low_precision, leaves)):
        return None
    return jnp.arange(len(leaves[0]), dtype=jnp.int32)


def index_without_upcast(indexed: Tree, arrays: Any, index: Int[Array, ...]) -> Tree:
    """Return `indexed`, recomputed on CPU if its floats are narrower than float32.

    Args:
      indexed: A pytree of `arrays[index]`, computed in any way. Gradients flow through it.
      arrays: The pytree of arrays that are indexed on their first axis.
      index: The index.
    """
    leaves, tree = jax.tree.flatten(indexed)
    low = [n for n, leaf in enumerate(leaves) if _is_low_precision(leaf)]
    if not low:
        return indexed
    sources = jax.tree.leaves(arrays)
    results = _index_behind_barrier([leaves[n] for n in low], [sources[n] for n in low], index)
    for n, leaf in zip(low, results, strict=True):
        leaves[n] = leaf
    return jax.tree.unflatten(tree, leaves)


@jax.custom_jvp
def _index_behind_barrier(
    indexed: Sequence[Array], arrays: Sequence[Array], index: Array
) -> Sequence[Array]:
    def on_cpu(indexed, arrays, index):
        arrays, index = jax.lax.optimization_barrier((arrays, index))
        return [array[index] for array in arrays]

    return jax.lax.platform_dependent(
        indexed, arrays, index, cpu=on_cpu, default=lambda indexed, *_: indexed
    )


@_index_behind_barrier.defjvp
def _(primals, tangents):
    return _index_behind_barrier(*primals), tangents[0]


def _is_low_precision(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
