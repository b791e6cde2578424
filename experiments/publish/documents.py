"""Write the results of a study, its figures and the tables of the documents."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from experiments.compare import runs
from experiments.publish.tables import TABLES
from mllm_jax import store

DOCUMENTS = ("README.md", "docs/results/README.md")
# Keys that show single pictures, whose files are not published.
OF_PICTURES = ("evidence", "pictures")
FIGURES = {
    "domain_neurons": ("overview", "neurons", "ablation", "deviation_by_layer"),
    "projection": ("overview",),
}
MARK = re.compile(r"<!-- (?P<study>\w+): (?P<table>\w+) -->\n(?:\n(?:\|.*\n)+)?")


def publish(workdir: pathlib.Path, root: pathlib.Path) -> None:
    """Publish a finished study.

    Args:
      workdir: The folder of the study.
      root: The folder of the repository.

    Raises:
      FileNotFoundError: A figure is missing.
      ValueError: The study is not finished, is damaged or of another format, or is not one of those
        that are published.
    """
    (run,) = runs.read([str(workdir)])
    study = run.results["study"]
    if study not in TABLES:
        raise ValueError(f"{workdir}: {study!r} is not published; {', '.join(TABLES)} are")
    published = {key: value for key, value in run.results.items() if key not in OF_PICTURES}
    # Read and made before anything is written, so that documents and results stay of one run.
    texts = {
        document: with_tables((root / document).read_text(encoding="utf-8"), {study: published})
        for document in DOCUMENTS
    }
    figures = {
        f"{study}-{name}.png": (workdir / f"figures/{name}.png").read_bytes()
        for name in FIGURES[study]
    }
    folder = root / "docs/results"
    store.write(folder / f"{study}.json", _by_line(published))
    for name, figure in figures.items():
        store.write(folder / name, figure)
    for document, text in texts.items():
        store.write(root / document, text)


def _by_line(results: Mapping[str, Any]) -> str:
    """Return results as JSON, one key per line, so that diffs show what changed."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def with_tables(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Return a document whose marked tables are those of the results; others are unchanged.

    Args:
      text: The document.
      results: The published results, by study.
    """

    def write(mark: re.Match) -> str:
        study, table = mark["study"], mark["table"]
        if study not in results:
            return mark[0]
        return f"<!-- {study}: {table} -->\n\n{TABLES[study][table](results[study])}\n"

    return MARK.sub(write, text)
