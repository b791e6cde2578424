"""Reductions: how a capture reduces the tensor of a site, within the pass and layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import tokens
from mllm_jax.interventions import attention_maps, logit_lens, top_tokens
from mllm_jax.interventions.attention_maps import Mass
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.interventions.results import Distribution, Entropy, Lens, Sparse, Stats
from mllm_jax.interventions.top_tokens import Histogram
from mllm_jax.numerics import rows
from mllm_jax.numerics.precision import at_least_float32, full_einsum
from mllm_jax.typing import AnyArray, Array, Bool, Float, Shaped


def expand_tokens(
    array: Shaped[AnyArray, "B T"], axis: int, rank: int
) -> Shaped[AnyArray, "B ... T ..."]:
    """Reshape an array [B, T] to broadcast over a site of this rank with its tokens on `axis`."""
    B, T = array.shape
    return array.reshape(B, *(1,) * (axis - 1), T, *(1,) * (rank - axis - 1))


def read_finite(capture: BoundCapture, x: Array, lens: Callable | None) -> Bool[Array, ""]:
    """Return whether x is finite at the selected tokens; see `finite`."""
    mask = expand_tokens(capture.tokens, capture.site.token_axis, x.ndim)
    return (jnp.isfinite(x) | ~mask).all()


def read_keep(capture: BoundCapture, x: Array, lens: Callable | None) -> Shaped[Array, ...]:
    """Return x, zero where not selected."""
    mask = expand_tokens(capture.tokens, capture.site.token_axis, x.ndim)
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def read_sparse(capture: BoundCapture, x: Array, lens: Callable | None) -> Sparse:
    """Return the largest units of each selected token."""
    k = min(capture.k, x.shape[-1])
    values, indices = jax.lax.top_k(at_least_float32(x), k)
    if capture.units is not None:
        indices = jnp.take(jnp.asarray(capture.units), indices)
    selected = capture.tokens[..., None]
    return Sparse(
        indices=jnp.where(selected, indices, -1),
        values=jnp.where(selected, values, 0),
        active=jnp.where(capture.tokens, (x > 0).sum(-1, dtype=jnp.int32), 0),
    )


def read_mean(capture: BoundCapture, x: Array, lens: Callable | None) -> Float[Array, "B ..."]:
    """Return the mean over the selected tokens of each row."""
    selected = expand_tokens(capture.tokens, 1, x.ndim)
    total = jnp.where(selected, at_least_float32(x), 0).sum(1)
    return _average(capture, total, capture.tokens.sum(-1))


def read_mass(capture: BoundCapture, x: Array, lens: Callable | None) -> Float[Array, "B N"] | Mass:
    """Return the mean attention of the selected queries of each row to the selected keys."""
    groups = attention_maps.group_keys(capture)
    seen = full_einsum("BNTS,BSk->BNTk", at_least_float32(x), groups)
    total = jnp.where(capture.tokens[:, None, :, None], seen, 0).sum(2)
    mass = _average(capture, total, capture.tokens.sum(-1))
    mass = mass.mean(1) if capture.heads == "mean" else mass
    return mass[..., 0] if capture.by is None else Mass(mass, capture.by)


def read_lens(capture: BoundCapture, x: Array, lens: Callable | None) -> Lens:
    """Return the logit lens of the selected tokens."""
    assert lens is not None, "a module with sites of the LM's width has a lens"
    return logit_lens.read(x, capture.tokens, lens, max(capture.k, 1))


def read_entropy(capture: BoundCapture, x: Array, lens: Callable | None) -> Entropy:
    """Return the entropy of the logit lens, summed over the tokens of each row by kind."""
    assert lens is not None, "a module with sites of the LM's width has a lens"
    result = logit_lens.read(x, capture.tokens, lens, 1)
    hot = _one_hot(capture)
    is_kind = hot > 0  # a product makes NaN of what other kinds hold
    entropy = jnp.where(is_kind, result.entropy[..., None], 0).sum(1)
    top = jnp.where(is_kind, jnp.exp(result.log_probs[..., :1]), 0).sum(1)
    counts = hot.sum(1).astype(jnp.int32)
    return Entropy(
        sum=_sum_by_row(capture, entropy),
        top=_sum_by_row(capture, top),
        tokens=_sum_by_row(capture, counts),
        kinds=capture.by or (),
    )


def read_distribution(capture: BoundCapture, x: Array, lens: Callable | None) -> Distribution:
    """Return the probabilities of all words, summed over the selected tokens by kind."""
    assert lens is not None, "a module with sites of the LM's width has a lens"
    weights = _weights(capture)
    total = logit_lens.sum_probabilities(at_least_float32(x), weights, lens)
    tokens = weights.astype(jnp.int32).sum((0, 1))
    if capture.by is None:
        total, tokens = total[0], tokens[0]
    return Distribution(sum=total, tokens=tokens, kinds=capture.by or ())


def read_stats(capture: BoundCapture, x: Array, lens: Callable | None) -> Stats:
    """Return statistics of every unit over the selected tokens, by kind."""
    hot = _weights(capture)
    parts = rows.map_rows_on_cpu(_row_stats, at_least_float32(x), hot, num_elements=x.size)
    positive, sums, rounding, centred, highest = (jnp.moveaxis(part, 1, -1) for part in parts)
    counts = hot.sum(1)
    counts = counts.reshape(len(hot), *(1,) * (sums.ndim - 2), -1)
    count, total = counts.sum(0), sums.sum(0)
    # The mean of a row minus the mean of all, corrected for the rounding of each, so that large
    # means lose no precision.
    apart = sums / jnp.maximum(counts, 1) - total / jnp.maximum(count, 1)
    apart = apart + rounding / jnp.maximum(counts, 1)
    apart = apart - (counts * apart).sum(0) / jnp.maximum(count, 1)
    centred = (centred + counts * apart**2).sum(0)
    result = Stats(
        positive=positive.astype(jnp.int32).sum(0),
        sum=total,
        squares=centred + total**2 / jnp.maximum(count, 1),
        max=highest.max(0),
        tokens=hot.astype(jnp.int32).sum((0, 1)),
        centred=centred,
        kinds=capture.by or (),
    )
    return result if capture.by is not None else jax.tree.map(lambda a: a[..., 0], result)


def read_histogram(capture: BoundCapture, x: Array, lens: Callable | None) -> Histogram:
    """Return how often each unit has a value in each bin, by kind."""
    return top_tokens.read_histogram(capture, x, lens, _weights(capture))


def _weights(capture: BoundCapture) -> Float[Array, "B T kinds"]:
    """Return the weight of each selected token: a tile counts once for each row that reads it."""
    hot = _one_hot(capture)
    if capture.readers is None:
        return hot
    return hot * jnp.asarray(capture.readers).sum(0, dtype=jnp.float32)[:, None, None]


def _row_stats(
    x: Float[Array, "B T ..."], hot: Float[Array, "B T kinds"]
) -> tuple[Float[Array, "B kinds ..."], ...]:
    """Compute the statistics of each row by kind.

    Args:
      x: The values.
      hot: The weight of each token, in at most one kind.

    Returns:
      The number of positive values, the sum of all values, the rounding error of that sum, the sum
      of squared deviations from the mean, and the maximum.
    """

    def total(values):  # counts stay exact in float32: far fewer than 2^24 tokens in one row
        return full_einsum("BTk,BT...->Bk...", hot, values)

    def highest(column):
        counted = column.reshape(*column.shape, *(1,) * (x.ndim - 2)) > 0
        return jnp.where(counted, x, -jnp.inf).max(1)

    x = jnp.where(expand_tokens(hot.any(-1), 1, x.ndim), x, 0)
    sums, counts = total(x), jnp.maximum(hot.sum(1), 1)
    counts = counts.reshape(*counts.shape, *(1,) * (x.ndim - 2))
    mean = full_einsum("BTk,Bk...->BT...", (hot > 0).astype(x.dtype), sums / counts)
    rounding = total(x - mean)  # zero except for the rounding of the mean
    centred = jnp.maximum(total((x - mean) ** 2) - rounding**2 / counts, 0)
    kinds = [highest(hot[..., i]) for i in range(hot.shape[-1])]
    return total((x > 0).astype(x.dtype)), sums, rounding, centred, jnp.stack(kinds, 1)


def _average(capture: BoundCapture, total: AnyArray, count: AnyArray) -> Float[Array, "B ..."]:
    """Return the mean of each row from the sums and token counts of each row or tile."""
    total, count = _sum_by_row(capture, total), _sum_by_row(capture, count)
    count, rows = (a.reshape(-1, *(1,) * (total.ndim - 1)) for a in (count, capture.rows))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.where(rows, jnp.nan, 0))


def _sum_by_row(capture: BoundCapture, total: AnyArray) -> AnyArray:
    """Sum the sums of tiles [I, ...] over the tiles that each row reads: [B, ...]."""
    if capture.readers is None:
        return total
    reads = jnp.asarray(capture.readers).reshape(*capture.readers.shape, *(1,) * (total.ndim - 1))
    return jnp.where(reads, total, 0).sum(1)  # a product makes NaN of what other rows read


def _one_hot(capture: BoundCapture) -> Float[Array, "B T kinds"]:
    """Return the selected tokens by kind; one kind without `by`."""
    selected = capture.tokens[..., None]
    if capture.by is not None:
        codes = np.array([tokens.CODE[kind] for kind in capture.by], np.int8)
        selected = selected & (capture.kind[..., None] == codes)
    return jnp.asarray(selected).astype(jnp.float32)
