"""Principal components of features, and how much of their variance lies between domains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mllm_jax.analysis import checks


class Components(NamedTuple):
    """The directions in which features vary most.

    Attributes:
      scores: float64[N, k], coordinates of each example.
      axes: float64[k, F], unit vectors whose entry of largest absolute value is positive.
      share: float64[k], share of the total variance; 0 if nothing varies.
      centre: float64[F], the mean.
    """

    scores: np.ndarray
    axes: np.ndarray
    share: np.ndarray
    centre: np.ndarray


def principal(features: np.ndarray, k: int = 2) -> Components:
    """Compute the first k principal components.

    Args:
      features: float[N, F], such as the mean over the tokens of each picture.
      k: Number of components, at most N and F.
    """
    features = checks.finite(features, "features", axes="[N, F]")
    if not 1 <= k <= min(features.shape):
        raise ValueError(f"k={k}: features {features.shape} have 1 to {min(features.shape)}")
    centred = _centred(features)
    left, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)[:, 0]
    sign = np.where(largest < 0, -1.0, 1.0)[:k]  # the sign of a component is arbitrary
    variance = (sizes / (sizes[0] or 1)) ** 2
    share = variance[:k] / (variance.sum() or 1)
    scores, centre = left[:, :k] * sizes[:k] * sign, features[0] - centred[0]
    return Components(scores, axes[:k] * sign[:, None], share, centre)


def between(features: np.ndarray, domain: np.ndarray) -> float:
    """Compute the share of the variance between the means of domains, 0 to 1; 0 if nothing varies.

    Args:
      features: float[N, F], of each example.
      domain: int[N], the domain of each example.
    """
    features = checks.finite(features, "features", axes="[N, F]")
    domain = checks.numbers(domain, "domain")
    if domain.shape != features.shape[:1] or not np.issubdtype(domain.dtype, np.integer):
        raise ValueError(f"domain must be {len(features)} integers, one per example")
    if not features.size:
        raise ValueError(f"features {features.shape} are of no example")
    centred = _centred(features)
    centred = centred / (np.abs(centred).max() or 1)
    means = np.stack([centred[domain == d].mean(axis=0) for d in np.unique(domain)])
    _, counts = np.unique(domain, return_counts=True)
    total = (centred**2).sum()
    return float((counts[:, None] * means**2).sum() / total) if total else 0.0


def _centred(features: np.ndarray) -> np.ndarray:
    """Subtract the mean; a constant becomes exactly zero, however its mean is rounded."""
    apart = features - features[0]
    return apart - apart.mean(axis=0)
