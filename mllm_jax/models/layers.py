"""Layers that networks share: linear maps, norms, stacking."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.numerics import precision
from mllm_jax.numerics.precision import at_least_float32
from mllm_jax.typing import Array, Float

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix W + scale A B in place of a kernel; `Linear` multiplies by it without the sum.

    In a dtype narrower than float32 the sum would round a small change away. Other code reads the
    sum with `[...]`.

    Attributes:
      weight: float[*L, n, m], W.
      a: float32[*L, n, r], A.
      b: float32[*L, r, m], B.
      scale: The factor of the change; static.
    """

    weight: Array
    a: Array
    b: Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the sum."""
        return self.weight.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of W."""
        return self.weight.dtype

    def __getitem__(self, index) -> Array:
        change = self.scale * precision.matmul(self.a, self.b)
        return (self.weight + change).astype(self.weight.dtype)[index]

    def multiply(self, x: Float[Array, "*B n"]) -> Float[Array, "*B m"]:
        """Return x (W + scale A B), rounded once."""
        low = precision.matmul(x, self.a.astype(x.dtype))
        change = precision.matmul(low, self.b.astype(x.dtype), into_float32=True)
        y = precision.matmul(x, self.weight, into_float32=True) + self.scale * change
        return y.astype(x.dtype)


class Linear(nnx.Linear):
    """x W + b, with the precision of `numerics.precision`."""

    def __call__(  # type: ignore[override]  # narrower than the base
        self, x: Float[Array, "*B n"]
    ) -> Float[Array, "*B m"]:
        """Return x W + b."""
        kernel = self.kernel.get_value()
        low_rank = isinstance(kernel, LowRank)
        y = kernel.multiply(x) if low_rank else precision.matmul(x, kernel)
        return y if self.bias is None else y + self.bias[...]


class LayerNorm(nnx.LayerNorm):
    """(x - mean) / std * scale + bias, in float32 or better."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        super().__init__(width, epsilon=eps, use_fast_variance=False, rngs=rngs)

    def __call__(  # type: ignore[override]  # narrower than the base
        self, x: Float[Array, "*B E"]
    ) -> Float[Array, "*B E"]:
        """Return the normalised array in the dtype of x."""
        return super().__call__(at_least_float32(x)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 or better.

    Args:
      width: The width D.
      eps: The epsilon.
      unit_offset: Whether the factor is 1 + scale, multiplied before the result is rounded to
        the dtype of x, as in Gemma.
      rngs: Unused: the scale starts as the identity.
    """

    def __init__(self, width: int, *, eps: float, unit_offset: bool = False, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.zeros((width,)) if unit_offset else jnp.ones((width,)))
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Return the normalised array in the dtype of x."""
        y = at_least_float32(x)
        y = y * self._inverse_rms(y)
        if self.unit_offset:
            return (y * (1 + at_least_float32(self.scale[...]))).astype(x.dtype)
        return (y.astype(x.dtype) * self.scale[...]).astype(x.dtype)

    def factor(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Return the factor of x in the norm, scale / rms(x), in float32 or better."""
        scale = at_least_float32(self.scale[...]) + self.unit_offset
        return scale * self._inverse_rms(at_least_float32(x))

    def _inverse_rms(self, x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
        return jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)


def stack(build: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Build `layers` modules as one whose parameters have a leading L axis, for a scan."""
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: build(nnx.Rngs(params=key)))(keys)
