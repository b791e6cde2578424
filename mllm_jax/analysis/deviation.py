"""How far an edit moves hidden states: relative L2 and 1 - cosine, by layer and token kind.

`sums` reduces a batch to one number per row, layer and kind and runs inside or outside `jax.jit`;
`join` puts batches together; `finish` turns the sums into means. A data set never needs more than
its sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.analysis import checks


class Sums(NamedTuple):
    """Sums over the tokens of each row. The dots stand for leading axes such as L.

    Attributes:
        relative_l2: float[..., kinds, B], sum of |edited - clean| / |clean|.
        cosine: float[..., kinds, B], sum of 1 - cos(clean, edited).
        tokens: float[kinds, B], sum of the weights.
    """

    relative_l2: np.ndarray | jax.Array
    cosine: np.ndarray | jax.Array
    tokens: np.ndarray | jax.Array


class Deviation(NamedTuple):
    """Means per token: float64[..., kinds] each; nan for a kind that has no tokens."""

    relative_l2: np.ndarray
    cosine: np.ndarray


def sums(clean: jax.Array, edited: jax.Array, weight: jax.Array) -> Sums:
    """Deviation of each row, summed over its tokens.

    Every token counts alike, whatever its norm. 1 - cosine is half the squared distance of the unit
    vectors, which is exact near zero. A token whose clean state is zero deviates by 0 if it is
    unchanged, else by 1. Vectors are scaled before they are squared, so that large ones do not
    overflow.

    Args:
        clean: float[..., B, T, D], hidden states without the edit; NumPy or JAX.
        edited: float[..., B, T, D], hidden states with it.
        weight: bool or float[kinds, B, T], 1 where a token is of that kind; padding has 0.

    Returns:
        The sums, in float32 for JAX and in float64 for NumPy.

    Raises:
        ValueError: a counted token is not finite. Under `jit` its sums are NaN, which `join` and
            `finish` refuse.
    """
    if clean.shape != edited.shape or weight.ndim != 3 or weight.shape[1:] != clean.shape[-3:-1]:
        raise ValueError(
            "clean and edited must be [..., B, T, D] and weight [kinds, B, T], "
            f"got shapes {clean.shape}, {edited.shape} and {weight.shape}"
        )
    xp = edited.__array_namespace__()
    dtype = xp.float64 if xp is np else xp.float32
    clean, edited, weight = (xp.asarray(array, dtype=dtype) for array in (clean, edited, weight))
    counted = (weight != 0).any(axis=0)[..., None]  # padding may hold anything, even nan
    clean, edited = xp.where(counted, clean, 0), xp.where(counted, edited, 0)
    for name, array in {"clean": clean, "edited": edited, "weight": weight}.items():
        if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
            checks.finite(array, name)  # says where
    if not isinstance(weight, jax.core.Tracer):
        checks.at_least(np.asarray(weight), 0, "weight")

    def norm(x):
        return xp.sqrt((x * x).sum(axis=-1))

    def largest(x):
        return xp.abs(x).max(axis=-1, initial=0)

    def scaled(x, by):
        return x / xp.where(by == 0, 1, by)[..., None]

    def unit(x):
        x = scaled(x, largest(x))
        return scaled(x, norm(x))

    nothing = largest(clean) == 0
    scale = xp.maximum(largest(clean), largest(edited))
    length, change = norm(scaled(clean, scale)), norm(scaled(edited, scale) - scaled(clean, scale))
    moved = xp.sign(change)  # 0 or 1, and nan where it is nan
    relative_l2 = xp.where(nothing, moved, change / xp.where(nothing, 1, length))
    chord = norm(unit(edited) - unit(clean))
    cosine = xp.where(nothing | (largest(edited) == 0), moved, chord * chord / 2)

    highest = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    product = np.einsum if xp is np else highest

    def by_kind(values):
        return product("...bt,kbt->...kb", xp.asarray(values, dtype=dtype), weight)

    return Sums(by_kind(relative_l2), by_kind(cosine), weight.sum(axis=-1))


def join(batches: Iterable[Sums]) -> Sums:
    """All rows of several batches, in order, as float64 NumPy arrays."""
    fields = list(zip(Sums._fields, zip(*batches, strict=True), strict=False))
    if not fields:
        raise ValueError("batches has no sums to join")
    return Sums(
        *(
            np.concatenate([checks.finite(part, name) for part in parts], axis=-1)
            for name, parts in fields
        )
    )


def finish(total: Sums) -> Deviation:
    """Mean deviation per token over all rows."""
    relative_l2, cosine, tokens = (
        checks.finite(part, name).sum(axis=-1)
        for name, part in zip(Sums._fields, total, strict=True)
    )
    with np.errstate(invalid="ignore"):
        means = [part / tokens for part in (relative_l2, cosine)]
    return Deviation(*means)
