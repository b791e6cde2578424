"""Principal components of features, and how much of their variance lies between domains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Components(NamedTuple):
    """The directions in which features vary most.

    Attributes:
        scores: float64[N, k], each example's coordinates.
        axes: float64[k, F], of length one; the entry of largest size is positive.
        share: float64[k], of the whole variance.
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
    features = _checked(features)
    if not 1 <= k <= min(features.shape):
        raise ValueError(f"k={k}: features {features.shape} have 1 to {min(features.shape)}")
    centre = features.mean(axis=0)
    left, sizes, axes = np.linalg.svd(features - centre, full_matrices=False)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)[:, 0]
    sign = np.where(largest < 0, -1.0, 1.0)[:k]  # a component has no direction of its own
    variance = sizes**2
    share = variance[:k] / max(variance.sum(), np.finfo(float).tiny)
    return Components(left[:, :k] * sizes[:k] * sign, axes[:k] * sign[:, None], share, centre)


def between(features: np.ndarray, domain: np.ndarray) -> float:
    """Share of the variance that lies between the means of domains, 0 to 1.

    Args:
        features: float[N, F].
        domain: int[N], each example's domain.
    """
    features, domain = _checked(features), np.asarray(domain)
    if domain.shape != features.shape[:1]:
        raise ValueError(f"domain must be {len(features)} integers, one an example")
    centred = features - features.mean(axis=0)
    means = np.stack([centred[domain == d].mean(axis=0) for d in np.unique(domain)])
    _, counts = np.unique(domain, return_counts=True)
    total = (centred**2).sum()
    return float((counts[:, None] * means**2).sum() / total) if total else 0.0


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(
            f"features must be [N, F] of finite numbers, not of shape {features.shape}"
        )
    return features
