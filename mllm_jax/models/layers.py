"""The few layers that every network shares: norms, attention, rotary positions, stacking."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.axes import Array, Bool, Float, Int
from mllm_jax.precision import at_least_float32

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class LayerNorm(nnx.LayerNorm):
    """(x - mean) / std * scale + bias, in float32 or better."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        super().__init__(width, epsilon=eps, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        return super().__call__(at_least_float32(x)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 or better."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        del rngs  # starts at one
        self.scale = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = at_least_float32(x)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y.astype(x.dtype) * self.scale[...]).astype(x.dtype)


def stack(build: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules in one, each parameter with a leading L axis, to be scanned."""
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: build(nnx.Rngs(params=key)))(keys)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B N T S"] | None,
    pattern: Callable[[Array], Array] = lambda p: p,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, with N / K query heads to each key-value head.

    Args:
      mask: bool[B, N or 1, T, S], True where a query may look; None for everywhere. A query
        that may look nowhere gets zeros.
      pattern: applied to the probabilities [B, N, T, S] before they meet the values.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    grouped = query.reshape(B, T, K, N // K, H)
    scores = at_least_float32(jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key)) * H**-0.5
    scores = scores.reshape(B, N, T, S)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores, -1)
    if mask is not None:
        probabilities = jnp.where(mask, probabilities, 0)
    probabilities = pattern(probabilities).astype(value.dtype)
    grouped = probabilities.reshape(B, K, N // K, T, S)
    return jnp.einsum("BKGTS,BSKH->BTKGH", grouped, value).reshape(B, T, N, H)


def rotary(
    positions: Int[Array, "B T"], head_width: int, theta: float
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Cosine and sine of rotary position embedding (Su et al. 2021), halves layout."""
    # NumPy, in this order: bit for bit what the weights were trained with. One ulp of a frequency
    # is an angle off by 1e-4 at position 4096.
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    frequency = 1 / np.float32(theta) ** exponent
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """x turned by its position."""
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], -1)
    return (x * cos + turned * sin).astype(x.dtype)
