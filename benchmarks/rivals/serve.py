"""The process of a rival: it runs a task for every line of its input.

    python -m benchmarks.rivals.serve RIVAL DIRECTORY

A line is `{"task": NAME, "pictures": NUMBER}` in JSON. The first line of a task prepares it and
runs it once, and its results are written to a file. Answers are JSON lines on the original standard
output; output of libraries goes to stderr.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import clock

Run = Callable[[], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Work:
    """The files of `benchmarks.work`: the inputs by name, the fields and the checkpoint."""

    checkpoint: pathlib.Path
    inputs: dict[str, np.ndarray]
    fields: dict

    @classmethod
    def read(cls, directory: pathlib.Path) -> Work:
        """Read the work that `benchmarks.work.make` has written to a directory."""
        with np.load(directory / "inputs.npz") as file:
            inputs = dict(file)
        return cls(
            directory / "checkpoint", inputs, json.loads((directory / "work.json").read_text())
        )

    def first(self, pictures: int) -> Work:
        """Return the work with the first pictures alone."""
        return dataclasses.replace(self, **first(self.inputs, self.fields, pictures))


def first(inputs: dict[str, np.ndarray], fields: dict, pictures: int) -> dict[str, Any]:
    """Return the inputs and fields of the first pictures alone, by name."""
    fewer = {name: inputs[name][:pictures] for name in ("ids", "pixels")}
    return {"inputs": inputs | fewer, "fields": fields | {"pictures": pictures}}


def main(rival: str, directory: str) -> None:
    """Serve tasks of a rival until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    work, module = (
        Work.read(pathlib.Path(directory)),
        importlib.import_module(f"benchmarks.rivals.{rival}"),
    )
    runs: dict[str, Run] = {}
    for line in sys.stdin:
        if line in runs:
            answer = _measure(runs[line])
        else:
            runs[line], answer = _prepare(module, work, **json.loads(line))
        print(json.dumps(answer), file=answers)


def _prepare(module: Any, work: Work, task: str, pictures: int) -> tuple[Run, dict[str, Any]]:
    """Return the task, and the file of its results with the measurements of its first run."""
    run = getattr(module, task)(work.first(pictures))
    lap = clock.lap(run)
    path = work.checkpoint.with_name(f"{module.__name__}-{task}-{pictures}.npz")
    np.savez(path, **lap.result)
    return run, {"result": str(path), "seconds": lap.seconds, "peak": lap.peak}


def _measure(run: Run) -> dict[str, Any]:
    lap = clock.lap(run)
    total = sum(float(np.abs(value).sum()) for value in lap.result.values())
    return {"total": total} | {
        name: getattr(lap, name) for name in ("seconds", "cpu", "rise", "peak")
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
