"""The comparison of finished runs; see `experiments/compare/__main__.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.compare import page, runs
from experiments.compare.numbers import Number
from mllm_jax import store
from mllm_jax.analysis import intervals, selectors
from mllm_jax.report import report


class Difference(NamedTuple):
    """The difference of a number of a run from that of the first.

    Attributes:
      value: The difference.
      low: The lower end of its 95 % interval; None if it has none.
      high: The upper end.
      examples: The number of examples of both runs over which the interval is; 0 if it is computed
        from the intervals of both.
    """

    value: float
    low: float | None
    high: float | None
    examples: int


def run(folders: Sequence[str], workdir: str, *, restart: bool = False) -> None:
    """Compare finished runs of one study.

    Args:
      folders: The workdirs of the runs, the reference first.
      workdir: The folder of the comparison.
      restart: Whether to start over.
    """
    compared = runs.read(folders)
    records = [[one.name, store.fingerprint([one.results, one.manifest])] for one in compared]
    folder = store.Workdir(workdir, {"runs": records}, restart=restart)
    results = {
        "format": report.FORMAT,
        "study": "compare",
        "of": compared[0].results["study"],
        "runs": [one.name for one in compared],
        "settings": settings(compared),
        "numbers": numbers(compared),
        "overlap": overlap(compared),
    }
    store.atomic_json(folder / "results.json", results)
    page.write(folder.path, results)
    store.write_manifest(folder)
    print(f"finished: {folder / 'index.html'}")


def settings(compared: Sequence[runs.Run]) -> list[dict[str, Any]]:
    """Return the settings that differ, with their value in each run; "" if it has none."""
    names = dict.fromkeys(name for one in compared for name in one.settings)
    rows = [
        {"setting": name, "values": [one.settings.get(name, "") for one in compared]}
        for name in names
    ]
    return [row for row in rows if len(set(row["values"])) > 1]


def numbers(compared: Sequence[runs.Run]) -> list[dict[str, Any]]:
    """Return the numbers that the first and another run have, with their differences."""
    first, *others = compared
    names = [name for name in first.numbers if any(name in one.numbers for one in others)]
    return [
        {
            "number": name,
            "values": [_row(one.numbers.get(name)) for one in compared],
            "differences": [_row(difference(first, one, name)) for one in others],
        }
        for name in names
    ]


def difference(first: runs.Run, other: runs.Run, name: str) -> Difference | None:
    """Return the difference of a number of two runs, with the interval that their data allow."""
    if name not in other.numbers:
        return None
    before, after = first.numbers[name], other.numbers[name]
    if _same_examples(first, other):
        a, b = first.examples(name), other.examples(name)
        if a is not None and b is not None and a.shape == b.shape:
            found = intervals.paired_difference(a, b)
            return Difference(float(found.value), float(found.low), float(found.high), len(a))
    return independent(before, after)


def independent(before: Number, after: Number) -> Difference:
    """Return after - before, with an interval from those of both as if they were independent.

    Zou & Donner 2008, "Construction of confidence limits about effect measures".
    """
    value = after.value - before.value
    ends = before.low, before.high, after.low, after.high
    if None in ends or not all(math.isfinite(end) for end in ends if end is not None):
        return Difference(value, None, None, 0)
    low = value - math.hypot(after.value - (after.low or 0), (before.high or 0) - before.value)
    high = value + math.hypot((after.high or 0) - after.value, before.value - (before.low or 0))
    return Difference(value, low, high, 0)


def overlap(compared: Sequence[runs.Run]) -> list[dict[str, Any]]:
    """Return the Jaccard index of the neurons of every two runs, beside that of random neurons."""
    masks = [(one.name, one.masks()) for one in compared]
    rows: list[dict[str, Any]] = []
    for (first, before), (second, after) in itertools.combinations(masks, 2):
        for name, a in before.items():
            b = after.get(name)
            if b is None or a.shape != b.shape:
                continue
            found = selectors.overlap({"a": a[None], "b": b[None]})
            rows.append(
                {
                    "runs": [first, second],
                    "neurons of": name,
                    "selected": [int(a.sum()), int(b.sum())],
                    "both": int((a & b).sum()),
                    "jaccard": float(found.jaccard[0, 0, 1]),
                    "chance": float(found.chance[0, 0, 1]),
                }
            )
    return rows


def _same_examples(first: runs.Run, other: runs.Run) -> bool:
    data = first.manifest.get("data")
    return data is not None and data == other.manifest.get("data")


def _row(number: Number | Difference | None) -> dict[str, Any] | None:
    if number is None or not np.isfinite(number.value):
        return None
    return dict(number._asdict())
