"""Norms, softmax, logits, entropies and statistics are computed in float32 or better.

A product of float32 arrays is a product in float32 on every chip. JAX by itself multiplies them in
TF32 on an H100 and in bfloat16 passes on a TPU; what `jax.default_matmul_precision`, or
`jax.config.update("jax_default_matmul_precision", ...)`, says instead holds here as well. Products
of narrower arrays are the chip's own, and accumulate in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.typing import Array, Float

PARAMETERS = ("float32", "bfloat16", "float16")


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where it has more digits: a model in float64 stays in float64."""
    return x.astype(wide(x.dtype))


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float32, or a dtype with more digits."""
    return jnp.promote_types(dtype, jnp.float32)


def product_precision(*operands: Any) -> jax.lax.Precision | None:
    """The `precision=` of a product: HIGHEST in float32, unless JAX's default was set."""
    if jax.config.jax_default_matmul_precision is not None:
        return None
    return jax.lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None


def einsum(equation: str, *operands: jax.Array, into_float32: bool = False) -> jax.Array:
    """`jnp.einsum`, in float32 where the operands are.

    Args:
      equation: in axis letters.
      into_float32: do not round the result to the dtype of narrower operands.
    """
    return jnp.einsum(
        equation,
        *operands,
        precision=product_precision(*operands),
        preferred_element_type=wide(jnp.result_type(*operands)) if into_float32 else None,
    )


def matmul(x: jax.Array, y: jax.Array, *, into_float32: bool = False) -> jax.Array:
    """x @ y, as `einsum` does it."""
    return jnp.matmul(
        x,
        y,
        precision=product_precision(x, y),
        preferred_element_type=wide(jnp.result_type(x, y)) if into_float32 else None,
    )


@jax.custom_jvp
def orthonormal(x: Float[Array, "D r"]) -> Float[Array, "D r"]:
    """Orthonormal columns that span those of x, by QR; its derivative too is of such products."""
    return jnp.linalg.qr(x)[0]


@orthonormal.defjvp
def _(primals, tangents):
    q, r = jnp.linalg.qr(primals[0])
    change = jax.lax.linalg.triangular_solve(r, tangents[0])  # dx R^-1
    across = matmul(q.T, change)
    below = jnp.tril(across, -1)
    return q, change + matmul(q, below - below.T - across)


def parameter_dtype(dtype: jax.typing.DTypeLike | None) -> jnp.dtype:
    """The dtype of a model's parameters: if None, float32 on CPU and bfloat16 elsewhere.

    Raises:
      ValueError: it is none of PARAMETERS; float64 is one where `jax_enable_x64` is set.
    """
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    known = PARAMETERS + ("float64",) * bool(jax.config.jax_enable_x64)
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or found.name not in known:
        raise ValueError(f"dtype={getattr(found, 'name', dtype)!s} is none of {', '.join(known)}")
    return found
