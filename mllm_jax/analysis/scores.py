"""Macro-F1 and accuracy of several runs, with bootstraps that resample pictures and runs.

Equal seeds resample alike, which pairs two samples: `difference` then subtracts them picture by
picture, and run by run where both have equally many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mllm_jax.analysis import checks, intervals, power

MARGIN = 0.05  # the largest change of a score that counts as none


class Sample(NamedTuple):
    """A metric of R runs, and its bootstrap distribution over pictures and runs.

    Attributes:
      runs: float64[R], the metric of each run.
      resamples: float64[resamples], its mean over runs in each resample.
      pictures: The number of pictures.
    """

    runs: np.ndarray
    resamples: np.ndarray
    pictures: int

    @property
    def mean(self) -> float:
        """The mean over runs."""
        return float(self.runs.mean())

    @property
    def deviation(self) -> float | None:
        """The standard deviation over runs; None for a single run."""
        return float(self.runs.std(ddof=1)) if len(self.runs) > 1 else None

    def interval(self, level: float = intervals.LEVEL) -> intervals.Interval[float]:
        """Return the mean and its interval."""
        low, high = intervals.percentiles(self.resamples, level=level)
        return intervals.Interval(self.mean, float(low), float(high))

    def row(self) -> dict[str, float | None]:
        """Return the sample as plain values, as results.json holds it."""
        _, low, high = self.interval()
        return {"mean": self.mean, "deviation": self.deviation, "low": low, "high": high}


def f1(truth: np.ndarray, predicted: np.ndarray, classes: int, **options) -> Sample:
    """Compute macro-F1: the mean over classes of 2 hits / (pictures + answers of the class).

    As in scikit-learn, a class that is neither true nor answered does not count; nor does -1.

    Args:
      truth: int[N], the true classes.
      predicted: int[R, N], the predicted classes.
      classes: Number of classes, C.
      **options: Resamples and seed. Equal seeds resample alike, which pairs two samples.
    """
    return _sample(_macro_f1, truth, predicted, classes, **options)


def accuracy(truth: np.ndarray, predicted: np.ndarray, classes: int, **options) -> Sample:
    """Compute the share of correct answers; see `f1`."""
    return _sample(_accuracy, truth, predicted, classes, **options)


def difference(sample: Sample, baseline: Sample) -> Sample:
    """Subtract a baseline, paired by picture, and by run where both have equally many."""
    if len(sample.resamples) != len(baseline.resamples):
        raise ValueError(
            f"samples of {len(sample.resamples)} and {len(baseline.resamples)} resamples do not "
            "pair up"
        )
    paired = len(sample.runs) == len(baseline.runs)
    runs = sample.runs - (baseline.runs if paired else baseline.runs.mean())
    return Sample(runs, sample.resamples - baseline.resamples, sample.pictures)


def equivalent(gain: Sample, margin: float = MARGIN, *, level: float = power.LEVEL) -> bool:
    """Return whether a difference is shown to be smaller than a margin in both directions (TOST).

    With few pictures, hardly any changed answer shows nothing, see `intervals.chance_of_fewer`.

    Args:
      gain: The difference, of `difference`.
      margin: The largest difference that counts as none, in (0, 1).
      level: Level of the test.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin={margin}: the largest change that counts as none is in (0, 1)")
    value, low, high = gain.interval(1 - 2 * level)
    least = intervals.chance_of_fewer(value, margin, gain.pictures)
    return -margin < low and high < margin and least <= level


def detectable(gain: Sample, *, level: float = power.LEVEL) -> power.Detectable:
    """Return the smallest differences that an interval such as that of `gain` could have found.

    They follow from its spread, but are at least those that this number of answers can show.

    Args:
      gain: The difference, of `difference`.
      level: One minus the mass of the interval.
    """
    least = power.answers(gain.pictures, 1, level=level)
    if least.possible is None or least.likely is None:
        return least
    error = float(gain.resamples.std(ddof=1))
    found = power.difference(error, gain.pictures - 1, 1, level=level)
    assert found.possible is not None and found.likely is not None  # a t test finds some effect
    return power.Detectable(max(least.possible, found.possible), max(least.likely, found.likely))


def change(sample: Sample, baseline: Sample) -> dict[str, float | None]:
    """Return the difference as results.json holds it; relative is None where the baseline is 0."""
    gain = difference(sample, baseline)
    value, low, high = gain.interval()
    return {
        "value": value, "low": low, "high": high,
        "relative": value / baseline.mean if baseline.mean else None,
        "equivalent": equivalent(gain),
    }  # fmt: skip


def _sample(
    metric: Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray],
    truth: np.ndarray,
    predicted: np.ndarray,
    classes: int,
    *,
    resamples: int = intervals.RESAMPLES,
    seed: int = 0,
) -> Sample:
    """Compute a metric of (drawn, truth, predicted, classes) and its bootstrap distribution."""
    truth = checks.integers(truth, "truth", axes="[N]")
    predicted = checks.integers(predicted, "answers")
    if predicted.ndim != 2 or predicted.shape[1:] != truth.shape or not predicted.size:
        raise ValueError(f"answers must be int[runs, {len(truth)}], got {predicted.shape}")
    if truth.min() < 0 or predicted.min() < -1 or max(truth.max(), predicted.max()) >= classes:
        raise ValueError(f"class ids must lie in 0 to {classes - 1}; -1 is an answer of no class")
    pictures = intervals.draws(len(truth), resamples=resamples, seed=seed).astype(np.float64)
    runs = intervals.draws(len(predicted), resamples=resamples, seed=(seed, 1))
    once = np.ones((1, len(truth)))
    values = metric(pictures, truth, predicted, classes)
    return Sample(
        metric(once, truth, predicted, classes)[0], (values * runs).sum(1) / len(predicted),
        len(truth),
    )  # fmt: skip


def _macro_f1(
    drawn: np.ndarray, truth: np.ndarray, predicted: np.ndarray, classes: int
) -> np.ndarray:
    """Return float64[resamples, R]; `drawn` float64[resamples, N] is how often each counts."""
    is_class = truth[:, None] == np.arange(classes)  # [N, C]
    true = drawn @ is_class.astype(np.float64)
    out = np.empty((len(drawn), len(predicted)))
    for run, answers in enumerate(predicted):
        is_answer = answers[:, None] == np.arange(classes)
        both = true + drawn @ is_answer.astype(np.float64)
        hits = drawn @ (is_class & is_answer).astype(np.float64)
        values = np.divide(2 * hits, both, out=np.zeros(both.shape), where=both > 0)
        out[:, run] = values.sum(1) / np.maximum((both > 0).sum(1), 1)
    return out


def _accuracy(
    drawn: np.ndarray, truth: np.ndarray, predicted: np.ndarray, classes: int
) -> np.ndarray:
    return drawn @ (predicted == truth).T.astype(np.float64) / len(truth)
