"""Metrics of single-label classification, from a confusion matrix.

    counts = confusion(truth, predicted, classes=4)     # -1: the answer names no class
    accuracy(counts), macro_f1(counts), table(counts, task.classes)

An answer that names no class is wrong: it lowers the recall of the true class, and the precision of
no class. As in scikit-learn (`labels=None, zero_division=0`), a class counts in the macro averages
if it occurs in the truth or in the answers; one that is only answered has an F1 of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def confusion(truth: ArrayLike, predicted: ArrayLike, classes: int) -> np.ndarray:
    """Count how often each class was answered with each class.

    Args:
      truth: int[N], class ids.
      predicted: int[N], class ids, or -1 where an answer names no class.
      classes: Number of classes, C.

    Returns:
      int64[C, C + 1], the true class by row; the last column counts answers of no class.
    """
    true, said = _integers(truth, "truth"), _integers(predicted, "predicted")
    if true.shape != said.shape or true.ndim != 1 or not true.size:
        raise ValueError(
            f"{said.shape} answers for {true.shape} classes; both need one per picture"
        )
    if true.min() < 0 or true.max() >= classes or said.min() < -1 or said.max() >= classes:
        raise ValueError(f"class ids lie in 0 to {classes - 1}, and -1 is an answer of no class")
    place = true * (classes + 1) + np.where(said < 0, classes, said)
    return np.bincount(place, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def accuracy(counts: np.ndarray) -> float:
    """Compute the share of correct answers."""
    counts = _checked(counts)
    return float(np.trace(counts) / counts.sum())


def precision(counts: np.ndarray) -> np.ndarray:
    """Return the share of the answers of each class that are correct, float64[C]; 0 if none."""
    counts = _checked(counts)
    return _over(np.diagonal(counts), counts[:, :-1].sum(0))


def recall(counts: np.ndarray) -> np.ndarray:
    """Return the share of the pictures of each class that are found, float64[C]; 0 if none."""
    counts = _checked(counts)
    return _over(np.diagonal(counts), counts.sum(1))


def f1(counts: np.ndarray) -> np.ndarray:
    """Return the harmonic mean of precision and recall, float64[C]; 0 if both are 0."""
    counts = _checked(counts)
    return _over(2 * np.diagonal(counts), counts.sum(1) + counts[:, :-1].sum(0))


def macro_f1(counts: np.ndarray) -> float:
    """Compute the mean of `f1` over the classes that occur in the truth or in the answers."""
    counts = _checked(counts)
    return float(f1(counts)[counts.sum(1) + counts[:, :-1].sum(0) > 0].mean())


def table(counts: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each class: class, images, answers, precision, recall, f1."""
    counts = _checked(counts)
    if len(names) != len(counts):
        raise ValueError(f"{len(names)} names for {len(counts)} classes")
    columns = {
        "images": counts.sum(1), "answers": counts[:, :-1].sum(0),
        "precision": precision(counts), "recall": recall(counts), "f1": f1(counts),
    }  # fmt: skip
    return [
        {"class": name} | {column: values[c].item() for column, values in columns.items()}
        for c, name in enumerate(names)
    ]


def _integers(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be class ids, which are integers, not {array.dtype}")
    return array


def _checked(counts: np.ndarray) -> np.ndarray:
    """Return counts if they have the form of `confusion`."""
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != counts.shape[0] + 1:
        raise ValueError(f"counts must be [C, C + 1], as `confusion` gives them: {counts.shape}")
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any() or not counts.any():
        raise ValueError("counts must be integers of 0 or more, and not all 0")
    return counts


def _over(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(hits, total, out=np.zeros(len(hits)), where=total > 0)
