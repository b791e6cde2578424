"""Layers that networks share: linear maps, norms, attention, rotary positions, stacking."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.numerics import precision, rows
from mllm_jax.numerics.precision import at_least_float32
from mllm_jax.typing import Array, Bool, Float

_BLOCKS = 4  # blocks of queries in causal attention

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
    """A matrix W + scale A B in the place of a kernel; `Linear` multiplies by it without the sum.

    In a dtype narrower than float32 a small change would be rounded away in the sum. Other code
    reads the sum by `[...]`.

    Attributes:
        weight: float[*L, n, m], W.
        a: float32[*L, n, r], A.
        b: float32[*L, r, m], B.
        scale: the factor of the change; static.
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
        """Return the normed array in the dtype of x."""
        return super().__call__(at_least_float32(x)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 or better.

    Args:
        width: D.
        eps: the epsilon.
        unit_offset: whether the factor is 1 + scale, multiplied before the result is rounded to
            the dtype of x, as Gemma has it.
        rngs: not used: the norm starts as the identity.
    """

    def __init__(self, width: int, *, eps: float, unit_offset: bool = False, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.zeros((width,)) if unit_offset else jnp.ones((width,)))
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Return the normed array in the dtype of x."""
        y = at_least_float32(x)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        if self.unit_offset:
            return (y * (1 + at_least_float32(self.scale[...]))).astype(x.dtype)
        return (y.astype(x.dtype) * self.scale[...]).astype(x.dtype)


def stack(build: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Build `layers` modules as one whose parameters have a leading L axis, for a scan."""
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: build(nnx.Rngs(params=key)))(keys)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B N T S"] | None,
    *,
    past: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]] | None = None,
    pattern: Callable[[Array], Array] | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Compute softmax(scale q k^T) v, with N / K query heads for each key-value head.

    Args:
        query: the queries.
        key: the keys.
        value: the values.
        mask: bool[B, N or 1, T, S], True where a query may attend; None for everywhere. The result
            of a query that may attend nowhere is zero.
        past: earlier keys and values; S of the mask counts both.
        pattern: a function applied to the probabilities [B, N, T, S] before they multiply the
            values. With None they are not all computed at the same time.
        causal: whether the mask is causal, so that products with later keys can be left out.
        scale: the factor of the products; 1 / sqrt(H) by default.
        softcap: the bound c of the products s, which become c tanh(s / c) (Gemma 2); None for none.
    """
    parts = [(key, value)] if past is None else [past, (key, value)]
    (B, T, N, H), S = query.shape, sum(key.shape[2] for key, _ in parts)
    score = functools.partial(_scale, scale=H**-0.5 if scale is None else scale, softcap=softcap)
    if pattern is not None:
        return _attend(score, query, parts, mask, pattern)
    numbers = B * N * T * S
    attend = (
        _attend_causally
        if causal and past is None and numbers > rows.MAX_ELEMENTS_AT_ONCE
        else _attend
    )
    attend = functools.partial(attend, score)
    return rows.map_rows_on_cpu(attend, query, parts, mask, num_elements=numbers)


def _scale(scores, scale: float, softcap: float | None):
    scores = scores * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _attend_causally(score, query, parts, mask):
    """Attend in blocks of queries, each with the keys up to its end."""
    [(key, value)], T = parts, query.shape[1]
    ends = [T * n // _BLOCKS for n in range(_BLOCKS + 1)]
    return jnp.concatenate(
        [
            _attend(score, query[:, i:j], [(key[:, :, :j], value[:, :, :j])], mask[:, :, i:j, :j])
            for i, j in itertools.pairwise(ends)
        ],
        1,
    )


def _attend(score, query, parts, mask, pattern=None):
    B, T, N, H = query.shape
    K = parts[0][0].shape[1]
    # In this order of axes the products need no transposition of an array of size [T, S].
    grouped = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = [
        precision.einsum("BKUH,BKSH->BKUS", grouped, key, into_float32=True) for key, _ in parts
    ]
    scores = score(_concatenate(scores).reshape(B, N, T, -1))
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    odds = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    share = 1 / odds.sum(-1, keepdims=True)
    if mask is not None:
        share = jnp.where(mask.any(-1, keepdims=True), share, 0)
    probabilities = odds * share
    if pattern is not None:
        probabilities = pattern(probabilities)
    probabilities = probabilities.astype(query.dtype).reshape(B, K, N // K * T, -1)
    ends = np.cumsum([key.shape[2] for key, _ in parts])[:-1]
    heads = sum(
        precision.einsum("BKUS,BKSH->BKUH", part, value)
        for part, (_, value) in zip(jnp.split(probabilities, ends, -1), parts, strict=True)
    )
    return heads.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _concatenate(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
