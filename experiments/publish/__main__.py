"""Publish a finished study of this repository: its results, figures, and the tables of documents.

    python -m experiments.publish WORKDIR

`docs/results/STUDY.json` receives the study's `results.json` without entries on single pictures,
and `docs/results/STUDY-FIGURE.png` its figures. README.md and docs/results/README.md mark tables
with a comment, `<!-- STUDY: TABLE -->`; the table below it is replaced.
"""

from __future__ import annotations

import pathlib

from experiments.running import cli


def check(arguments: list[str]) -> None:
    """Check the argument."""
    if len(arguments) != 1:
        raise ValueError("name one finished run: python -m experiments.publish WORKDIR")
    cli.require_path("WORKDIR", arguments[0])


def main(arguments: list[str]) -> None:
    """Publish the study."""
    from experiments.publish import documents

    documents.publish(pathlib.Path(arguments[0]), pathlib.Path(__file__).parents[2])


if __name__ == "__main__":
    cli.run_with_arguments(main, check)
