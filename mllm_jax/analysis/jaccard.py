"""Jaccard index of two sets of neurons, from their sizes.

|A and B| / |A or B| is 1 for equal sets, 0 for disjoint ones, and 0 here where both are empty.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mllm_jax.analysis import checks


def index(shared: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike) -> np.ndarray:
    """Return the Jaccard index of sets of sizes `first` and `second`, float64[...].

    Args:
      shared: Number of elements of both sets.
      first: Number of elements of one set.
      second: Number of elements of the other.
    """
    return shared / np.maximum(np.add(first, second) - shared, 1)


def by_chance(first: npt.ArrayLike, second: npt.ArrayLike, total: int) -> np.ndarray:
    """Return the index of random sets with the expected number of shared elements, float64[...].

    Args:
      first: Number of elements of one set.
      second: Number of elements of the other.
      total: Number of elements that both are drawn from.
    """
    return index(np.multiply(first, second) / total, first, second)


def of_masks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the indices float64[D_] of the neurons of each domain in two bool[D_, L, F]."""
    a, b = checks.mask(a, "a"), checks.mask(b, "b")
    return index(*(mask.sum(axis=(1, 2)) for mask in (a & b, a, b)))
