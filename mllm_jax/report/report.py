"""The report of a study: its page, figures and tables, built from its results."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mllm_jax import store
from mllm_jax.report import page, tables

FORMAT = 2  # the version of results.json, increased when its keys change
RELOAD = 60  # seconds after which the page of a running study is reloaded
RUNNING = " The study is still running: this page shows its results so far, and reloads itself."
Results = Mapping[str, Any]  # the content of results.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a study.

    Attributes:
      study: The name of the study.
      keys: The keys that its results must have.
      title: The title of the page.
      lead: A function that returns the question of the study in a sentence or two.
      facts: A function that returns (number, label) of the row below the title.
      overview: A function that writes the summary figure, and returns it or None.
      sections: Functions that write the figures and tables of a section, and return it, or None if
        that part of the results is empty.
    """

    study: str
    keys: Sequence[str]
    title: str
    lead: Callable[[Results], str]
    facts: Callable[[Results], Sequence[tuple[str, str]]]
    overview: Callable[[pathlib.Path, Results], page.Figure | None]
    sections: Sequence[Callable[[pathlib.Path, Results], page.Section | None]]

    def write(self, workdir: str | os.PathLike, results: Results) -> None:
        """Write `figures/`, `tables/` and, at the end, `index.html`.

        The same results give the same bytes.

        Args:
          workdir: The folder of the study, with the pictures that the results name.
          results: The content of results.json.

        Raises:
          ValueError: The results lack a key, or have another format.
        """
        require_keys(results, self.keys, self.study)
        self._write(workdir, results)

    def preview(self, workdir: str | os.PathLike, results: Results) -> None:
        """Write the report of a running study; its page reloads itself.

        Args:
          workdir: See `write`.
          results: The content of results.json so far.
        """
        self._write(workdir, {**{key: {} for key in self.keys}, **results}, reload=RELOAD)

    def _write(self, workdir: str | os.PathLike, results: Results, reload: int = 0) -> None:
        folder = pathlib.Path(workdir)
        built = [build(folder, results) for build in self.sections]
        sections = [_with_latex(folder, section) for section in built if section]
        content = page.Page(
            title=self.title,
            lead=self.lead(results) + (RUNNING if reload else ""),
            facts=self.facts(results),
            figure=self.overview(folder, results),
            sections=sections,
            data=() if reload else page.RECORDS,
            reload=reload,
        )
        page.write(folder / "index.html", content)


def _with_latex(folder: pathlib.Path, section: page.Section) -> page.Section:
    """Write the table of a section for LaTeX, and return the section with a link to it."""
    table = section.table
    if table is None:
        return section
    name = re.sub("[^a-z]+", "_", section.title.lower()).strip("_") + ".tex"
    text = tables.latex(table.columns, table.rows, table.numeric())
    store.write(folder / "tables" / name, text)
    return dataclasses.replace(section, data=[*section.data, (name, f"tables/{name}")])


def require_keys(results: Results, keys: Sequence[str], study: str) -> None:
    """Raise a ValueError if results of a study lack a key or have another format."""
    if missing := [key for key in keys if key not in results]:
        raise ValueError(f"results.json of {study} lacks {', '.join(missing)}; run the study again")
    if results.get("format") != FORMAT:
        raise ValueError(
            f"results.json of {study} has format {results.get('format')}, but this version reads "
            f"format {FORMAT}; run the study again"
        )
