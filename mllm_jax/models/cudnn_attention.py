"""Attention on NVIDIA GPUs by cuDNN: scores are never in memory (FlashAttention, Dao et al. 2022).

`jax.nn.dot_product_attention` calls it. Here are the conditions under which it applies, and what it
lacks for this library: lanes of `jax.vmap`, masks without a row for each query, and queries that
may not attend to any key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mllm_jax.sharding import mesh
from mllm_jax.typing import Array, Bool, Float

Attend = Callable[[Array, Array, Array, Array | None], Array]
IMPLEMENTATION = "cudnn"
MAX_WIDTH = 128  # of a head, on every generation of GPUs
_WIDTH_MULTIPLE = 8
_FIRST_GENERATION = 8  # Ampere, by compute capability


@functools.cache
def is_available() -> bool:
    """Return whether JAX finds cuDNN, and the GPUs, if there are any, have its attention."""
    array = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    call = functools.partial(jax.nn.dot_product_attention, implementation=IMPLEMENTATION)
    try:
        jax.eval_shape(call, array, array, array)
    except RuntimeError:  # cuDNN, or JAX's plugin for CUDA, is not installed
        return False
    if jax.default_backend() != "gpu":
        return True
    generations = (int(d.compute_capability.split(".")[0]) for d in jax.local_devices())
    return min(generations) >= _FIRST_GENERATION


def supports(query: Float[Array, "B T N H"], softcap: float | None) -> bool:
    """Return whether cuDNN computes attention of these queries, if the platform is CUDA."""
    H = query.shape[-1]
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and H <= MAX_WIDTH
        and H % _WIDTH_MULTIPLE == 0
        and softcap is None
        and not mesh.is_split()
        and is_available()
    )


def attend(
    otherwise: Attend,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B ... S"] | None,
    *,
    scale: float,
    causal: bool,
) -> Float[Array, "B T N H"]:
    """Compute softmax(scale q k^T) v by cuDNN where the platform is CUDA.

    Args:
      otherwise: The same function of queries, keys, values and mask, for all other platforms and
        for derivatives (those of cuDNN exist only in reverse mode and with few masks).
      query: The queries.
      key: The keys.
      value: The values.
      mask: True where a query may attend to a key, [B, 1 or N, 1 or T, S]; None for all keys. The
        result of a query that may not attend to any key is zero.
      scale: The factor of the products.
      causal: Whether the mask, of as many queries as keys, is causal, so that products with later
        keys can be left out.
    """

    @jax.custom_jvp
    def call(query, key, value, mask):
        fused = functools.partial(_attend_in_lanes, scale, causal)
        return jax.lax.platform_dependent(query, key, value, mask, cuda=fused, default=otherwise)

    @call.defjvp
    def _(primals, tangents):
        *arrays, mask = primals
        _, change = jax.jvp(lambda *a: otherwise(*a, mask), tuple(arrays), tuple(tangents[:3]))
        return call(*primals), change

    return call(query, key, value, mask)


def _attend_in_lanes(
    scale: float, causal: bool, query: Array, key: Array, value: Array, mask: Array | None
) -> Float[Array, "B T N H"]:
    """Attend; under `jax.vmap`, lanes are further rows, since cuDNN has one axis of rows only."""

    @jax.custom_batching.custom_vmap
    def call(query, key, value, mask):
        return _attend(scale, causal, query, key, value, mask)

    @call.def_vmap
    def _(lanes, batched, *arrays):
        def to_rows(array, is_batched):
            if not is_batched:
                array = jnp.broadcast_to(array, (lanes, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        out = call(*jax.tree.map(to_rows, arrays, tuple(batched)))
        return out.reshape(lanes, -1, *out.shape[1:]), True

    return call(query, key, value, mask)


def _attend(
    scale: float, causal: bool, query: Array, key: Array, value: Array, mask: Array | None
) -> Float[Array, "B T N H"]:
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    attend = functools.partial(
        jax.nn.dot_product_attention, query, key, value,
        scale=scale, is_causal=causal, implementation=IMPLEMENTATION,
    )  # fmt: skip
    if mask is None:
        return attend()
    heads = attend(mask=jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1])))
    return jnp.where(mask.any(-1).swapaxes(1, 2)[..., None], heads, 0)
