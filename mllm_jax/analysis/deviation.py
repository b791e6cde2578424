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
    unchanged, else by 1.

    Args:
        clean: float[..., B, T, D], hidden states without the edit; NumPy or JAX.
        edited: float[..., B, T, D], hidden states with it.
        weight: bool or float[kinds, B, T], 1 where a token is of that kind; padding has 0.

    Returns:
        The sums, in float32 for JAX and in float64 for NumPy.
    """
    if clean.shape != edited.shape or weight.ndim != 3 or weight.shape[1:] != clean.shape[-3:-1]:
        raise ValueError(
            "clean and edited must be [..., B, T, D] and weight [kinds, B, T], "
            f"got shapes {clean.shape}, {edited.shape} and {weight.shape}"
        )
    xp = edited.__array_namespace__()
    dtype = xp.float64 if xp is np else xp.float32
    clean, edited, weight = (xp.asarray(array, dtype=dtype) for array in (clean, edited, weight))

    def norm(x):
        return xp.sqrt((x * x).sum(axis=-1))

    def unit(x):
        length = norm(x)[..., None]
        return x / xp.where(length > 0, length, 1)

    length, change = norm(clean), norm(edited - clean)
    relative_l2 = xp.where(length > 0, change / xp.where(length > 0, length, 1), change > 0)
    chord = norm(unit(edited) - unit(clean))
    cosine = xp.where((length > 0) & (norm(edited) > 0), chord * chord / 2, change > 0)

    highest = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    product = np.einsum if xp is np else highest

    def by_kind(values):
        counted = xp.where(
            (weight > 0).any(axis=0), values, 0
        )  # padding may hold anything, even nan
        return product("...bt,kbt->...kb", xp.asarray(counted, dtype=dtype), weight)

    return Sums(by_kind(relative_l2), by_kind(cosine), weight.sum(axis=-1))


def join(batches: Iterable[Sums]) -> Sums:
    """All rows of several batches, in order, as float64 NumPy arrays."""
    return Sums(
        *(
            np.concatenate([np.asarray(part, np.float64) for part in parts], axis=-1)
            for parts in zip(*batches, strict=True)
        )
    )


def finish(total: Sums) -> Deviation:
    """Mean deviation per token over all rows."""
    tokens = np.asarray(total.tokens, np.float64).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        means = [np.asarray(part, np.float64).sum(axis=-1) / tokens for part in total[:2]]
    return Deviation(*means)
