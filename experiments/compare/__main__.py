"""Compare two or more finished runs of one study, such as different seeds, models or settings.

    python -m experiments.compare RUN RUN ... --workdir=DIR

Each RUN is the workdir of a finished study. The first run is the reference: differences are those
of the others from it.

The workdir receives `index.html`, `results.json`, `tables/settings.csv` (the settings that differ),
`tables/numbers.csv` (every number of their `results.json`, with differences and their intervals),
`tables/overlap.csv` (the overlap of selected neurons, beside that expected by chance), and
`manifest.json`. The interval of a difference is over the same examples if both runs stored a value
for each example and read the same data; otherwise it is computed from the intervals of both runs as
if they were independent (Zou & Donner 2008); without intervals there is none.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments.running import cli

WORKDIR = flags.DEFINE_string("workdir", "comparison", "The folder of the comparison.")
RESTART = flags.DEFINE_bool(
    "restart", False, "Remove the files of an earlier comparison in the workdir, and start over."
)


def check(runs: list[str]) -> None:
    """Check the runs and the flags."""
    if len(runs) < 2:
        raise ValueError("name two finished runs or more: python -m experiments.compare RUN RUN")
    for run in runs:
        cli.require_path("RUN", run)
    resolved = [pathlib.Path(run).resolve() for run in runs]
    if len(set(resolved)) < len(resolved):
        raise ValueError("a run is named twice: name the workdirs of different runs")
    if pathlib.Path(WORKDIR.value or "").resolve() in resolved:
        raise ValueError(f"--workdir={WORKDIR.value} is one of the runs: choose another folder")
    cli.refuse_file("--workdir", WORKDIR.value)


def main(runs: list[str]) -> None:
    """Write the comparison."""
    from experiments.compare import study

    study.run(runs, WORKDIR.value or "", restart=RESTART.value)


if __name__ == "__main__":
    cli.run_with_arguments(main, check)
