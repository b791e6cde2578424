"""The tokens on which each unit is strongest, weakest or drawn at random, and histograms of units.

The results have a fixed size, whatever the number of tokens, and merge over batches: `mj.reduce`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook_results
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.numerics import rows
from mllm_jax.numerics.precision import at_least_float32
from mllm_jax.sharding import mesh
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int

Order = Literal["largest", "smallest", "random"]
# Bins that show the tails of activations as well as their sign.
EDGES = (-8, -4, -2, -1, -0.5, -0.25, -0.1, 0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Top:
    """k tokens for each unit, best first; ties go to the earlier example, then the earlier token.

    With `bins` the axis of bins precedes k: k tokens for each range of values.

    Attributes:
      value: The value of the unit, float32[L, F, k]; NaN where there are fewer than k tokens. A
        token whose value is NaN comes first, and has an example.
      example: The example, counted from 0 through the data, int32[L, F, k]; -1 where there is none.
      token: The token of the example, counted without padding, or of the tile, int32[L, F, k].
      tile: The tile within the example, int16[L, F, k]; -1 for text.
      row: The row on the grid of the tile, int16[L, F, k]; -1 elsewhere.
      column: The column on that grid, int16[L, F, k]; -1 elsewhere.
      examples: The number of examples that were read, int32[].
      order: The order by which tokens are kept. Static.
    """

    value: Float[AnyArray, "L F k"]
    example: Int[AnyArray, "L F k"]
    token: Int[AnyArray, "L F k"]
    tile: Int[AnyArray, "L F k"]
    row: Int[AnyArray, "L F k"]
    column: Int[AnyArray, "L F k"]
    examples: Int[AnyArray, ""]
    order: Order = dataclasses.field(metadata={"static": True})

    def merge(self, other: Top) -> Top:
        """Return the best tokens of both; the examples of `other` follow these."""
        shifted = np.where(other.example < 0, -1, other.example + self.examples)
        other = dataclasses.replace(other, example=shifted)

        def both(name: str) -> AnyArray:  # one at a time: all of them are large
            return np.concatenate([getattr(self, name), getattr(other, name)], -1)

        strength = _strength(both("value"), both("token"), self.order, np)
        # Both are in order, and a stable sort keeps it among equals: these examples come first.
        order = np.argsort(np.where(both("example") < 0, np.inf, -strength), axis=-1, kind="stable")
        starts = np.arange(0, order.size, order.shape[-1]).reshape(*order.shape[:-1], 1)
        best = order[..., : self.value.shape[-1]] + starts
        names = ("value", "example", "token", "tile", "row", "column")
        picked = {name: both(name).reshape(-1).take(best) for name in names}
        return Top(**picked, examples=self.examples + other.examples, order=self.order)

    def wide(self) -> Top:
        """Return the same on the host, with examples in int64."""
        host = jax.tree.map(np.asarray, self)
        examples = np.asarray(host.examples, np.int64).reshape(-1)[0]  # every layer has the same
        return dataclasses.replace(
            host, example=np.asarray(host.example, np.int64), examples=examples
        )

    def _repr_html_(self) -> str:
        return notebook_results.top(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Histogram:
    """The number of values of each unit in each bin. With `by`, the last axis is kinds.

    Attributes:
      counts: int32[L, F, bins, kinds]; bin i holds edges[i - 1] <= value < edges[i], the first bin
        values below all edges, the last bin values at or above all.
      edges: The edges of the bins, float32[bins - 1].
      kinds: The names along the last axis; empty without `by`. Static.
      nan: The number of NaN values, which are in no bin, int32[L, F, kinds].
    """

    counts: Int[AnyArray, "L F bins kinds"]
    edges: Float[AnyArray, " bins-1"]
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    nan: Int[AnyArray, "L F kinds"] | int = 0

    def merge(self, other: Histogram) -> Histogram:
        """Return the counts of both."""
        counts, nan = self.counts + other.counts, self.nan + other.nan
        return dataclasses.replace(self, counts=counts, nan=nan)

    def wide(self) -> Histogram:
        """Return the same in int64 on the host."""
        edges = np.asarray(self.edges)
        edges = edges.reshape(-1, edges.shape[-1])[0]  # every layer has the same
        counts, nan = (np.asarray(array, np.int64) for array in (self.counts, self.nan))
        return Histogram(counts, edges, self.kinds, nan)

    def _repr_html_(self) -> str:
        return notebook_results.histogram(self)


def read_top(order: Order) -> Callable[[BoundCapture, Array, Callable | None], Top]:
    """Return the reduction that keeps the k first tokens of each unit in an order."""

    def read(capture: BoundCapture, x: Array, lens: Callable | None) -> Top:
        return _top(capture, x, order, jnp.asarray(capture.tokens)[..., None])

    return read


def read_sample(capture: BoundCapture, x: Array, lens: Callable | None) -> Top:
    """Return k tokens of each unit for each range of its values, drawn by a hash of the value."""
    edges = jnp.asarray(capture.edges, jnp.float32)
    # The last bin holds infinity too; NaN is in no bin.
    low, high = jnp.append(-jnp.inf, edges), jnp.append(edges, jnp.nan)

    def of_bin(ends):
        y = at_least_float32(x)
        inside = (y >= ends[0]) & ~(y >= ends[1]) & jnp.asarray(capture.tokens)[..., None]
        return _top(capture, x, "random", inside)

    result = jax.lax.map(of_bin, (low, high))
    by_bin = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1) if a.ndim > 1 else a[0], result)
    return dataclasses.replace(by_bin, examples=result.examples[0])


def read_histogram(
    capture: BoundCapture, x: Array, lens: Callable | None, weight: Float[Array, "B T kinds"]
) -> Histogram:
    """Return the number of values of each unit in each bin, with tokens counted by weight."""
    edges, y = jnp.asarray(capture.edges, jnp.float32), at_least_float32(x)
    below = _count_below(y, weight, jnp.append(-jnp.inf, edges))
    nan, total = below[0], jnp.broadcast_to(weight.sum((0, 1)), below.shape[1:])
    counts = jnp.diff(jnp.concatenate([below, total[None]]), axis=0)
    counts, nan = jnp.moveaxis(counts, 0, 1).astype(jnp.int32), nan.astype(jnp.int32)
    if capture.by is None:
        counts, nan = counts[..., 0], nan[..., 0]
    return Histogram(counts, edges, capture.by or (), nan)


def _count_below(
    x: Float[Array, "B T F"], weight: Float[Array, "B T kinds"], edges: Float[Array, " n"]
) -> Float[Array, "n F kinds"]:
    """Return the number of tokens, by weight, whose value is not at or above each edge.

    NaN is counted for every edge, and is the only value counted for the edge -inf. The sums are
    exact in float32: a batch has far fewer than 2^24 tokens.
    """

    def edge_by_edge(x, weight):
        # A sum fuses with the comparison; a product would write every comparison to memory.
        by_kind = [weight[..., kind, None] for kind in range(weight.shape[-1])]
        return jax.lax.map(
            lambda edge: jnp.stack([jnp.where(x >= edge, 0, w).sum((0, 1)) for w in by_kind], -1),
            edges,
        )

    def token_by_token(x, weight):  # on CPUs the sums of all edges stay in the cache
        def add(counts, token):
            value, of_kind = token
            above = value >= edges[:, None]
            return counts + jnp.where(above, 0, of_kind[:, None, None]), None

        zeros = jnp.zeros((weight.shape[-1], len(edges), x.shape[-1]))
        tokens = x.reshape(-1, x.shape[-1]), weight.reshape(-1, weight.shape[-1])
        return jnp.moveaxis(jax.lax.scan(add, zeros, tokens)[0], 0, -1)

    if mesh.is_active():  # rows may lie on different devices
        return edge_by_edge(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=token_by_token, default=edge_by_edge)


def _top(
    capture: BoundCapture, x: Float[Array, "B T F"], order: Order, mask: Bool[Array, "B T #F"]
) -> Top:
    places = capture.places
    assert places is not None, "a form that needs places has them"
    B, T, F = x.shape
    value = at_least_float32(x)

    def of_tokens(value, token, mask):
        return jnp.where(mask, _strength(value, token[..., None], order, jnp), -jnp.inf)

    # As one operation with the transpose, a CPU would jump through memory for every element.
    strength = rows.map_rows_on_cpu(
        of_tokens, value, jnp.asarray(places.token), mask, num_elements=2 * x.size
    )
    k = min(capture.k, B * T)
    best, at = jax.lax.top_k(strength.reshape(B * T, F).T, k)
    is_token = best > -jnp.inf

    def pick(array: AnyArray, missing: Any) -> Array:
        by_token = jnp.broadcast_to(jnp.asarray(array).reshape(B, -1), (B, T)).reshape(-1)
        return _padded(jnp.where(is_token, by_token[at], missing), capture.k, missing)

    picked = value.reshape(B * T, F)[at, jnp.arange(F)[:, None]]
    return Top(
        value=_padded(jnp.where(is_token, picked, jnp.nan), capture.k, jnp.nan),
        example=pick(places.example, -1),
        token=pick(places.token, -1),
        tile=pick(places.tile, -1),
        row=pick(places.row, -1),
        column=pick(places.column, -1),
        examples=jnp.asarray(places.examples, jnp.int32),
        order=order,
    )


def _padded(array: Float[Array, "F n"] | Int[Array, "F n"], k: int, missing: Any) -> Array:
    return jnp.pad(array, ((0, 0), (0, k - array.shape[-1])), constant_values=missing)


def _strength(value: AnyArray, token: AnyArray, order: Order, xp: Any) -> AnyArray:
    """Return the key by which tokens are ranked: the value, or a hash of the value and the token.

    NaN ranks first, so that it is noticed; zeros of both signs are equal, and -inf means no token.
    """
    if order != "random":
        strength = value if order == "largest" else -value
        strength = xp.where(strength == 0, 0, xp.maximum(strength, xp.finfo(strength.dtype).min))
        return xp.where(xp.isnan(value), xp.inf, strength)
    bits = xp.asarray(value, np.float32).view(np.uint32)
    mixed = bits ^ (xp.asarray(token).astype(np.uint32) * np.uint32(0x9E3779B9))
    for factor in (0x85EBCA6B, 0xC2B2AE35):  # the finaliser of MurmurHash3
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(factor)
    return ((mixed ^ (mixed >> 16)) >> 8).astype(np.float32)
