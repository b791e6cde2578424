"""The distance by which an edit moves hidden states: relative L2 and 1 - cosine.

`sums` reduces a batch to one number per row, layer and token kind, inside or outside of `jax.jit`;
`join` concatenates batches; `finish` turns the sums into means. Only the sums of a data set are
kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from mllm_jax.analysis import checks
from mllm_jax.numerics import precision
from mllm_jax.typing import AnyArray


class Sums(NamedTuple):
    """Sums over the tokens of each row; the dots stand for leading axes such as L.

    Attributes:
      relative_l2: float[..., kinds, B], sum of |edited - clean| / |clean|.
      cosine: float[..., kinds, B], sum of 1 - cos(clean, edited).
      tokens: float[kinds, B], sum of the weights.
    """

    relative_l2: np.ndarray | jax.Array
    cosine: np.ndarray | jax.Array
    tokens: np.ndarray | jax.Array


class Deviation(NamedTuple):
    """Means per token; nan for a kind without tokens.

    Attributes:
      relative_l2: float64[..., kinds], mean of |edited - clean| / |clean|.
      cosine: float64[..., kinds], mean of 1 - cos(clean, edited).
    """

    relative_l2: np.ndarray
    cosine: np.ndarray


def sums(clean: AnyArray, edited: AnyArray, weight: AnyArray) -> Sums:
    """Compute the deviation of each row, summed over its tokens.

    Every token has the same weight, whatever its norm. 1 - cosine is computed as half the squared
    distance of the unit vectors, which is accurate near zero. A token whose clean state is zero
    deviates by 0 if it is unchanged, otherwise by 1. Vectors are scaled before they are squared, so
    that large ones do not overflow.

    Args:
      clean: float[..., B, T, D], hidden states without the edit; NumPy or JAX.
      edited: float[..., B, T, D], hidden states with it.
      weight: bool or float[kinds, B, T], 1 where a token is of that kind; 0 for padding.

    Returns:
      The sums, in float32 for JAX and in float64 for NumPy.

    Raises:
      ValueError: A token with a weight is not finite. Under `jit` its sums are NaN, which `join`
        and `finish` refuse.
    """
    if clean.shape != edited.shape or weight.ndim != 3 or weight.shape[1:] != clean.shape[-3:-1]:
        raise ValueError(
            "clean and edited must be [..., B, T, D] and weight [kinds, B, T], "
            f"got shapes {clean.shape}, {edited.shape} and {weight.shape}"
        )
    xp: Any = edited.__array_namespace__()
    dtype = xp.float64 if xp is np else xp.float32
    clean, edited, weight = (xp.asarray(array, dtype=dtype) for array in (clean, edited, weight))
    counted = (weight != 0).any(axis=0)[..., None]  # padding may be anything, even nan
    clean, edited = xp.where(counted, clean, 0), xp.where(counted, edited, 0)
    for name, array in {"clean": clean, "edited": edited, "weight": weight}.items():
        if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
            checks.finite(array, name)  # says where
    if not isinstance(weight, jax.core.Tracer):
        checks.at_least(np.asarray(weight), 0, "weight")

    is_zero = _largest(xp, clean) == 0
    scale = xp.maximum(_largest(xp, clean), _largest(xp, edited))
    scaled_clean, scaled_edited = (_divide(xp, x, scale) for x in (clean, edited))
    length, change = _norm(xp, scaled_clean), _norm(xp, scaled_edited - scaled_clean)
    moved = xp.sign(change)  # 0 or 1, and nan where it is nan
    relative_l2 = xp.where(is_zero, moved, change / xp.where(is_zero, 1, length))
    chord = _norm(xp, _unit(xp, edited) - _unit(xp, clean))
    cosine = xp.where(is_zero | (_largest(xp, edited) == 0), moved, chord * chord / 2)

    product = np.einsum if xp is np else precision.full_einsum

    def by_kind(values: Any) -> Any:
        return product("...BT,kBT->...kB", xp.asarray(values, dtype=dtype), weight)

    return Sums(by_kind(relative_l2), by_kind(cosine), weight.sum(axis=-1))


def _norm(xp: Any, x: Any) -> Any:
    return xp.sqrt((x * x).sum(axis=-1))


def _largest(xp: Any, x: Any) -> Any:
    return xp.abs(x).max(axis=-1, initial=0)


def _divide(xp: Any, x: Any, by: Any) -> Any:
    """Divide vectors by numbers, where 0 is taken as 1."""
    return x / xp.where(by == 0, 1, by)[..., None]


def _unit(xp: Any, x: Any) -> Any:
    """Return unit vectors. They are scaled before they are squared, so that none overflows."""
    x = _divide(xp, x, _largest(xp, x))
    return _divide(xp, x, _norm(xp, x))


def join(batches: Iterable[Sums]) -> Sums:
    """Concatenate the rows of several batches, in order, as float64 NumPy arrays."""
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
    """Compute the mean deviation per token over all rows."""
    relative_l2, cosine, tokens = (
        checks.finite(part, name).sum(axis=-1)
        for name, part in zip(Sums._fields, total, strict=True)
    )
    with np.errstate(invalid="ignore"):
        means = [part / tokens for part in (relative_l2, cosine)]
    return Deviation(*means)
