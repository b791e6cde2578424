"""Principal components of features, and how much of their variance lies between domains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mllm_jax.analysis import checks


class Components(NamedTuple):
    """The directions in which features vary most.

    Attributes:
        scores: float64[N, k], each example's coordinates.
        axes: float64[k, F], of length one; the entry of largest size is positive.
        share: float64[k], of the whole variance; 0 where nothing varies.
        centre: float64[F], the mean.
    """

    scores: np.ndarray
    axes: np.ndarray
    share: np.ndarray
    centre: np.ndarray


def principal(features: np.ndarray, k: int = 2) -> Components:
    """The first k principal components.

    Args:
        features: float[N, F], such as the mean over the tokens of a picture.
        k: how many, at most N and F.
    """
    features = checks.finite(features, "features", axes="[N, F]")
    if not 1 <= k <= min(features.shape):
        raise ValueError(f"k={k}: features {features.shape} have 1 to {min(features.shape)}")
    centred = _centred(features)
    left, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)[:, 0]
    sign = np.where(largest < 0, -1.0, 1.0)[:k]  # a component has no direction of its own
    variance = (sizes / (sizes[0] or 1)) ** 2
    share = variance[:k] / (variance.sum() or 1)
    scores, centre = left[:, :k] * sizes[:k] * sign, features[0] - centred[0]
    return Components(scores, axes[:k] * sign[:, None], share, centre)


def between(features: np.ndarray, domain: np.ndarray) -> float:
    """Share of the variance that lies between the means of domains, 0 to 1; 0 if nothing varies.

    Args:
        features: float[N, F].
        domain: int[N], each example's domain.
    """
    features = checks.finite(features, "features", axes="[N, F]")
    domain = checks.numbers(domain, "domain")
    if domain.shape != features.shape[:1] or not np.issubdtype(domain.dtype, np.integer):
        raise ValueError(f"domain must be {len(features)} integers, one an example")
    if not features.size:
        raise ValueError(f"features {features.shape} are of no example")
    centred = _centred(features)
    centred = centred / (np.abs(centred).max() or 1)
    means = np.stack([centred[domain == d].mean(axis=0) for d in np.unique(domain)])
    _, counts = np.unique(domain, return_counts=True)
    total = (centred**2).sum()
    return float((counts[:, None] * means**2).sum() / total) if total else 0.0


def _centred(features: np.ndarray) -> np.ndarray:
    """Less the mean. What is constant is zero exactly, whatever the mean of it is rounded to."""
    apart = features - features[0]
    return apart - apart.mean(axis=0)
