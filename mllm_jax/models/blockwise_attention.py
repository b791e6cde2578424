"""Softmax attention a block of keys at a time, so that the scores [T, S] are never in memory.

The softmax is a running one: a maximum, a sum and weighted values are accumulated over blocks and
rescaled to the larger maximum (Milakov & Gimelshein 2018, Rabe & Staats 2021, Dao et al. 2022). The
derivative recomputes the scores of each block. It is defined as a JVP, which JAX transposes for
gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mllm_jax.numerics import precision
from mllm_jax.sharding import mesh
from mllm_jax.typing import Array, Bool, Float, Int

# The scores of a block, of all rows and heads on a device: so few that a TPU keeps them on chip.
MAX_SCORES = 2**23
KEYS = 512  # in a block, at most
SMALLEST = 128  # queries or keys of a block, unless there are fewer
_MULTIPLE = 16  # of the keys of a block, so that products have whole tiles

Mask = Bool[Array, "#B #K #G #T S"] | None


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """The scores of a query and a key: scale q k, bounded to c tanh(scale q k / c) by a soft cap.

    Attributes:
      scale: The factor of the products.
      softcap: The bound c; None if there is none.
    """

    scale: float
    softcap: float | None = None

    def __call__(self, products: Float[Array, "*"]) -> Float[Array, "*"]:
        """Return the scores of products of queries and keys."""
        scores = products * self.scale
        if self.softcap is None:
            return scores
        return self.softcap * jnp.tanh(scores / self.softcap)

    def slope(self, scores: Float[Array, "*"]) -> Float[Array, "*"] | float:
        """Return the derivative of the scores with respect to the products."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - jnp.square(scores / self.softcap))


class Block(NamedTuple):
    """Some keys and their values.

    Attributes:
      number: The number of the block, int32[].
      key: The keys; in the argument of a scan, all arrays lead with the number of blocks.
      value: The values.
    """

    number: Int[Array, ""]
    key: Float[Array, "B K c H"]
    value: Float[Array, "B K c H"]


class _Running(NamedTuple):
    """A softmax over the keys so far, by query.

    Attributes:
      peak: The largest score.
      mass: The sum of exp(score - peak).
      heads: The sum of exp(score - peak) value.
    """

    peak: Float[Array, "B K G T"]
    mass: Float[Array, "B K G T"]
    heads: Float[Array, "B K G T H"]


def attend(
    rule: ScoreRule,
    query: Float[Array, "B K G T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Mask,
) -> Float[Array, "B K G T H"]:
    """Compute softmax(rule(q k)) v in float32 or better.

    Args:
      rule: The function from products to scores.
      query: The queries, G = N / K heads for each head of keys.
      key: The keys.
      value: The values.
      mask: True where a query may attend to a key; None for all keys. The result of a query that
        may not attend to any key is zero.
    """
    T, S = query.shape[3], key.shape[2]
    queries, most_keys = _block_size(query, S)
    size = _even_part(S, most_keys)
    missing = -S % size

    def blocks(array):
        array = jnp.pad(array, ((0, 0), (0, 0), (0, missing), (0, 0)))
        return jnp.moveaxis(array.reshape(*array.shape[:2], -1, size, array.shape[-1]), 2, 0)

    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 0), (0, missing)))
    elif missing:
        mask = (jnp.arange(S + missing) < S)[None, None, None, None]
    keys, values = blocks(key), blocks(value)
    if queries >= T:
        return _attend(rule, query, keys, values, mask)[0]
    return _by_queries(rule, _even_part(T, queries), query, keys, values, mask)


def _block_size(query: Float[Array, "B K G T H"], keys: int) -> tuple[int, int]:
    """Return the largest numbers of queries and keys of a block, for all rows and heads."""
    B, K, G, T, _ = query.shape
    heads = B * K * G // (mesh.shard_count("B", B) * mesh.shard_count("K", K))
    keys = min(keys, max(SMALLEST, min(KEYS, MAX_SCORES // (heads * SMALLEST))))
    return min(T, max(SMALLEST, MAX_SCORES // (heads * keys) // SMALLEST * SMALLEST)), keys


def _even_part(length: int, most: int) -> int:
    """Return the size of the fewest parts of equal size of at most `most`, in whole tiles."""
    count = -(-length // most)
    return -(-length // (count * _MULTIPLE)) * _MULTIPLE


def _by_queries(
    rule: ScoreRule, size: int, query: Array, keys: Array, values: Array, mask: Mask
) -> Float[Array, "B K G T H"]:
    """Attend with `size` queries at a time."""
    T = query.shape[3]

    def parts(array):
        array = jnp.pad(array, ((0, 0),) * 3 + ((0, -T % size), (0, 0)))
        return jnp.moveaxis(array.reshape(*array.shape[:3], -1, size, array.shape[-1]), 3, 0)

    if mask is None or mask.shape[3] == 1:
        heads = jax.lax.map(lambda q: _attend(rule, q, keys, values, mask)[0], parts(query))
    else:
        heads = jax.lax.map(
            lambda part: _attend(rule, part[0], keys, values, part[1])[0],
            (parts(query), parts(mask)),
        )
    return jnp.moveaxis(heads, 0, 3).reshape(*query.shape[:3], -1, query.shape[-1])[:, :, :, :T]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    rule: ScoreRule,
    query: Float[Array, "B K G T H"],
    keys: Float[Array, "n B K c H"],
    values: Float[Array, "n B K c H"],
    mask: Mask,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
    """Return the heads, and log(sum(exp(score))) by query; 0 if it may not attend to any key."""
    dtype = precision.at_least_float32_dtype(query.dtype)
    lowest = float(jnp.finfo(dtype).min)

    def add(so_far: _Running, block: Block):
        scores = _masked(rule(_products(query, block.key)), mask, block.number, lowest)
        peak = jnp.maximum(so_far.peak, scores.max(-1))
        shrink, odds = jnp.exp(so_far.peak - peak), jnp.exp(scores - peak[..., None])
        heads = _weighted(odds, block.value)
        return _Running(
            peak,
            so_far.mass * shrink + odds.sum(-1),
            so_far.heads * shrink[..., None] + heads,
        ), None

    nothing = jnp.zeros(query.shape[:-1], dtype)
    start = _Running(nothing + lowest, nothing, jnp.zeros(query.shape, dtype))
    (peak, mass, heads), _ = jax.lax.scan(add, start, _numbered(keys, values))
    nowhere = peak == lowest
    heads = heads * jnp.where(nowhere, 0, 1 / mass)[..., None]
    return heads, jnp.where(nowhere, 0, peak + jnp.log(mass))


@_attend.defjvp
def _(rule: ScoreRule, primals: tuple[Any, ...], tangents: tuple[Any, ...]):
    query, keys, values, mask = primals
    d_query, d_keys, d_values, _ = tangents
    heads, log_sum = _attend(rule, *primals)
    lowest = float(jnp.finfo(heads.dtype).min)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan prevents it
    def add(so_far, blocks):
        block, change = blocks
        scores = rule(_products(query, block.key))
        slope = rule.slope(scores)
        scores = _masked(scores, mask, block.number, lowest)
        shares = jnp.exp(scores - log_sum[..., None])
        d_products = _products(d_query, block.key) + _products(query, change.key)
        d_odds = shares * slope * d_products
        d_heads, d_log_sum = so_far
        d_heads += _weighted(d_odds, block.value) + _weighted(shares, change.value)
        return (d_heads, d_log_sum + d_odds.sum(-1)), None

    zeros = jnp.zeros_like(heads), jnp.zeros_like(log_sum)
    both = _numbered(keys, values), _numbered(d_keys, d_values)
    (d_heads, d_log_sum), _ = jax.lax.scan(add, zeros, both)
    return (heads, log_sum), (d_heads - heads * d_log_sum[..., None], d_log_sum)


def _numbered(keys, values) -> Block:
    return Block(jnp.arange(len(keys), dtype=jnp.int32), keys, values)


def _products(
    query: Float[Array, "B K G T H"], key: Float[Array, "B K c H"]
) -> Float[Array, "B K G T c"]:
    return precision.einsum("BKGTH,BKcH->BKGTc", query, key, into_float32=True)


def _weighted(
    weights: Float[Array, "B K G T c"], value: Float[Array, "B K c H"]
) -> Float[Array, "B K G T H"]:
    weights = weights.astype(value.dtype)
    return precision.einsum("BKGTc,BKcH->BKGTH", weights, value, into_float32=True)


def _masked(
    scores: Float[Array, "B K G T c"], mask: Mask, number: Int[Array, ""], lowest: float
) -> Float[Array, "B K G T c"]:
    """Return the scores of a block, with `lowest` where a query may not attend."""
    if mask is None:
        return scores
    size = scores.shape[-1]
    return jnp.where(jax.lax.dynamic_slice_in_dim(mask, number * size, size, -1), scores, lowest)
