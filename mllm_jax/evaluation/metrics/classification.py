"""Metrics of single-label classification, from a confusion matrix.

    counts = confusion(truth, said, classes=4)     # -1 in said: the answer named no class
    accuracy(counts), macro_f1(counts), table(counts, task.classes)

An answer that names no class is wrong, and it is no class: it lowers recall, and the precision of
none. As in scikit-learn (`labels=None, zero_division=0`), a class counts in the macro averages if
it occurs in the truth or in the answers; one that is only answered has an F1 of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def confusion(truth: Sequence[int], said: Sequence[int], classes: int) -> np.ndarray:
    """int64[C, C + 1]: how often each class (row) was called what; the last column is no class.

    Args:
        truth: int[N], class ids.
        said: int[N], class ids, or -1 where an answer names no class.
        classes: C.
    """
    truth, said = _integers(truth, "truth"), _integers(said, "said")
    if truth.shape != said.shape or truth.ndim != 1 or not truth.size:
        raise ValueError(f"{said.shape} answers for {truth.shape} classes; both need one a picture")
    if truth.min() < 0 or truth.max() >= classes or said.min() < -1 or said.max() >= classes:
        raise ValueError(f"class ids lie in 0 to {classes - 1}, and -1 is an answer of no class")
    place = truth * (classes + 1) + np.where(said < 0, classes, said)
    return np.bincount(place, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def accuracy(counts: np.ndarray) -> float:
    """The share of right answers."""
    counts = _checked(counts)
    return float(np.trace(counts) / counts.sum())


def precision(counts: np.ndarray) -> np.ndarray:
    """float64[C]: of the answers that name a class, the right ones; 0 if none does."""
    counts = _checked(counts)
    return _over(np.diagonal(counts), counts[:, :-1].sum(0))


def recall(counts: np.ndarray) -> np.ndarray:
    """float64[C]: of the pictures of a class, those that were named so; 0 if there are none."""
    counts = _checked(counts)
    return _over(np.diagonal(counts), counts.sum(1))


def f1(counts: np.ndarray) -> np.ndarray:
    """float64[C]: the harmonic mean of precision and recall; 0 if both are."""
    counts = _checked(counts)
    return _over(2 * np.diagonal(counts), counts.sum(1) + counts[:, :-1].sum(0))


def macro_f1(counts: np.ndarray) -> float:
    """The mean of `f1` over the classes that occur in the truth or in the answers."""
    counts = _checked(counts)
    return float(f1(counts)[counts.sum(1) + counts[:, :-1].sum(0) > 0].mean())


def table(counts: np.ndarray, names: Sequence[str]) -> list[dict]:
    """A row for each class, for a CSV: class, images, answers, precision, recall, f1."""
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


def _integers(values, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be class ids, which are integers, not {values.dtype}")
    return values


def _checked(counts: np.ndarray) -> np.ndarray:
    """Counts as `confusion` gives them."""
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != counts.shape[0] + 1:
        raise ValueError(f"counts must be [C, C + 1], as `confusion` gives them: {counts.shape}")
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any() or not counts.any():
        raise ValueError("counts must be integers from 0, and not all of them 0")
    return counts


def _over(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(hits, total, out=np.zeros(len(hits)), where=total > 0)
