"""Softmax attention a block of keys at a time, so that the scores [T, S] are never in memory.

The softmax is a running one: a maximum, a sum and weighted values are accumulated over blocks and
rescaled to the larger maximum (Milakov & Gimelshein 2018, Rabe & Staats 2021, Dao et al. 2022). The
derivative recomputes the scores of each block. It is defined as a JVP, which JAX transposes for
gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mllm_jax.numerics import precision
from mllm_jax.sharding import mesh
from mllm_jax.typing import Array, Bool, Float, Int, Shaped

KEYS = 512  # in a block, at most
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
    max_scores: int | None = None,
) -> Float[Array, "B K G T H"]:
    """Compute softmax(rule(q k)) v in float32 or better.

    Args:
      rule: The function from products to scores.
      query: The queries, G = N / K heads for each head of keys.
      key: The keys.
      value: The values.
      mask: True where a query may attend to a key; None for all keys. The result of a query that
        may not attend to any key is zero.
      max_scores: The largest number of scores of a block on each device, for which rows and heads
        are processed in parts; None for all rows and heads at the same time.
    """
    if max_scores is None:
        return _attend_by_blocks(rule, query, key, value, mask)
    parts = Parts.of(query, max_scores)
    arrays = jax.tree.map(parts.split, (query, key, value, mask))
    return parts.join(jax.lax.map(lambda part: _attend_by_blocks(rule, *part), arrays))


def _attend_by_blocks(
    rule: ScoreRule, query: Array, key: Array, value: Array, mask: Mask
) -> Float[Array, "B K G T H"]:
    S = key.shape[2]
    count = -(-S // KEYS)
    size = -(-S // (count * _MULTIPLE)) * _MULTIPLE
    missing = count * size - S

    def blocks(array):
        array = jnp.pad(array, ((0, 0), (0, 0), (0, missing), (0, 0)))
        return jnp.moveaxis(array.reshape(*array.shape[:2], count, size, -1), 2, 0)

    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 0), (0, missing)))
    elif missing:
        mask = (jnp.arange(count * size) < S)[None, None, None, None]
    return _attend(rule, query, blocks(key), blocks(value), mask)[0]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A division of the rows and key heads of each device into parts of equal size.

    Attributes:
      counts: The numbers of parts of the rows, and of the heads of keys.
      shards: The numbers of devices that share the rows, and the heads of keys.
    """

    counts: tuple[int, int]
    shards: tuple[int, int]

    @classmethod
    def of(cls, query: Float[Array, "B K G T H"], max_scores: int) -> Parts:
        """Return the fewest parts with at most `max_scores` scores of a block, if there are any."""
        B, K, G, T, _ = query.shape
        shards = mesh.shard_count("B", B), mesh.shard_count("K", K)
        heads = max_scores // (G * T * KEYS)  # of keys, in a part
        rows, all_heads = B // shards[0], K // shards[1]
        count = _fewest_parts(rows, heads // all_heads)
        return cls((count, _fewest_parts(all_heads, heads) if count == rows else 1), shards)

    @property
    def count(self) -> int:
        """The number of parts."""
        return math.prod(self.counts)

    def split(self, array: Shaped[Array, "B K *rest"]) -> Shaped[Array, "n b k *rest"]:
        """Return the parts of an array; axes of length 1 are in all of them."""
        axes: list[int] = []
        for size, count, shards in zip(array.shape, self.counts, self.shards, strict=False):
            axes += (1, 1, 1) if size == 1 else (shards, count, size // shards // count)
        array = array.reshape(*axes, *array.shape[2:])
        array = jnp.broadcast_to(
            array, (axes[0], self.counts[0], *axes[2:4], self.counts[1], axes[5], *array.shape[6:])
        )
        array = jnp.moveaxis(array, (1, 4), (0, 1))
        return array.reshape(self.count, axes[0] * axes[2], axes[3] * axes[5], *array.shape[6:])

    def join(self, parts: Shaped[Array, "n b k *rest"]) -> Shaped[Array, "B K *rest"]:
        """Return the array of which these are the parts."""
        _, b, k, *rest = parts.shape
        (rows, heads), (row_shards, head_shards) = self.counts, self.shards
        array = parts.reshape(
            rows, heads, row_shards, b // row_shards, head_shards, k // head_shards, *rest
        )
        return jnp.moveaxis(array, (0, 1), (1, 4)).reshape(b * rows, k * heads, *rest)


def _fewest_parts(length: int, most: int) -> int:
    """Return the smallest number of equal parts that are of at most `most`, or of 1."""
    return next((n for n in range(1, length) if length % n == 0 and length // n <= most), length)


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
