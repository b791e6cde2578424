"""The process of a rival: it prepares, warms up, and runs once for every line of its input.

    python -m benchmarks.rivals.serve RIVAL TASK DIRECTORY

Answers are JSON lines on the original standard output; output of libraries goes to stderr.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import sys

import numpy as np

from benchmarks import clock


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


def main(rival: str, task: str, directory: str) -> None:
    """Serve one task of a rival until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    prepare = getattr(importlib.import_module(f"benchmarks.rivals.{rival}"), task)
    run = prepare(Work.read(pathlib.Path(directory)))
    path = pathlib.Path(directory) / f"{rival}-{task}.npz"
    np.savez(path, **run())
    print(json.dumps({"result": str(path)}), file=answers)
    for _ in sys.stdin:
        lap = clock.lap(run)
        total = sum(float(np.abs(value).sum()) for value in lap.result.values())
        answer = {"seconds": lap.seconds, "cpu": lap.cpu, "rise": lap.rise, "total": total}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
