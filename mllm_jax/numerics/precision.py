"""Compute norms, softmax, logits, entropies and statistics in float32 or better.

A product of float32 arrays is a product in float32 on every device. By default JAX multiplies such
arrays in TF32 on an H100 and in bfloat16 passes on a TPU. A setting of the user
(`jax.default_matmul_precision`, or `jax.config.update("jax_default_matmul_precision", ...)`) takes
precedence. Products of narrower arrays use the device's own arithmetic and accumulate in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from mllm_jax.typing import Array, Float

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")


def at_least_float32(x: jax.Array) -> jax.Array:
    """Convert x to float32; float64 arrays are unchanged, so that float64 models stay exact."""
    return x.astype(at_least_float32_dtype(x.dtype))


def at_least_float32_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return float32, or the dtype itself if it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def product_precision(*operands: ArrayLike) -> jax.lax.Precision | None:
    """Return the `precision=` of a product: HIGHEST in float32, unless JAX's default was set."""
    if getattr(jax.config, "jax_default_matmul_precision") is not None:  # noqa: B009 - not typed
        return None
    return jax.lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None


def einsum(equation: str, *operands: jax.Array, into_float32: bool = False) -> jax.Array:
    """Compute `jnp.einsum`, in float32 if the operands are float32.

    Args:
      equation: The equation, in axis letters.
      *operands: The arrays.
      into_float32: Whether to return float32 instead of rounding to the dtype of narrower
        operands.
    """
    return jnp.einsum(
        equation,
        *operands,
        precision=product_precision(*operands),
        preferred_element_type=_result_dtype(into_float32, *operands),
    )


def full_einsum(equation: str, *operands: ArrayLike) -> jax.Array:
    """Compute `jnp.einsum` in full precision, for statistics: no setting of the user lowers it."""
    return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)


def matmul(x: jax.Array, y: jax.Array, *, into_float32: bool = False) -> jax.Array:
    """Compute x @ y, with the precision of `einsum`."""
    return jnp.matmul(
        x,
        y,
        precision=product_precision(x, y),
        preferred_element_type=_result_dtype(into_float32, x, y),
    )


def _result_dtype(into_float32: bool, *operands: jax.Array) -> jnp.dtype | None:
    return at_least_float32_dtype(jnp.result_type(*operands)) if into_float32 else None


@jax.custom_jvp
def orthonormalize(x: Float[Array, "D r"]) -> Float[Array, "D r"]:
    """Return orthonormal columns with the span of those of x, by QR.

    R has a positive diagonal, so that columns that are already orthonormal are unchanged. The
    derivative is defined here so that its products also have the precision of `matmul`.
    """
    return _positive_qr(x)[0]


def _positive_qr(x: Float[Array, "D r"]) -> tuple[Float[Array, "D r"], Float[Array, "r r"]]:
    """Return the QR decomposition with a positive diagonal of R, which is unique."""
    q, r = jnp.linalg.qr(x)
    signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)
    return q * signs, signs[:, None] * r


@orthonormalize.defjvp
def _(primals, tangents):
    q, r = _positive_qr(primals[0])
    change = jax.lax.linalg.triangular_solve(r, tangents[0])  # dx R^-1
    across = matmul(q.T, change)
    below = jnp.tril(across, -1)
    return q, change + matmul(q, below - below.T - across)


def parameter_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """Return the dtype of a model's parameters.

    Args:
      dtype: A member of PARAMETER_DTYPES, or float64 where `jax_enable_x64` is set; None is
        float32 on CPU and bfloat16 elsewhere.

    Raises:
      ValueError: The dtype is not supported.
    """
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    supported = PARAMETER_DTYPES + ("float64",) * bool(getattr(jax.config, "jax_enable_x64"))  # noqa: B009
    try:
        resolved = jnp.dtype(dtype)
    except (TypeError, ValueError):
        resolved = None
    if resolved is None or resolved.name not in supported:
        name = getattr(resolved, "name", dtype)
        raise ValueError(f"dtype={name!s} is not one of {', '.join(supported)}")
    return resolved
