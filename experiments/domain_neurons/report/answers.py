"""The answers that an ablation changed, before and after, for each cell of the matrix."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.domain_neurons.report import panels
from mllm_jax.report import markup, page, parts
from mllm_jax.report.report import Results

Run = Mapping[str, Any]  # an entry of `ablation` in results.json


@dataclasses.dataclass(frozen=True)
class ChangedAnswers:
    """A list of expandable cells, each with its changed answers as a table.

    Attributes:
      results: The content of results.json.
    """

    results: Results

    def html(self) -> str:
        """Return the cells as HTML; the id of each is that of `panels.cell_id`."""
        cells = [self._cell(run) for run in _selected(self.results)]
        title = f"Changed answers of the {len(cells)} cells"
        return f'<details class="answers"><summary>{title}</summary>{"".join(cells)}</details>'

    def _cell(self, run: Run) -> str:
        domains = self.results["domains"]
        mask, data = (domains.index(run[key]) for key in ("mask", "data"))
        rows = [row[2:] for row in _rows(self.results, run)]
        rest = run["changes"] - len(rows)
        more = f'<p class="note">{rest:,} more in the steps of the study.</p>' if rest else ""
        name = f"{parts.title(run['module'])}: neurons of {run['mask']} ablated, on {run['data']}"
        shown = page.table(page.Table(COLUMNS[2:], rows), name) + more if rows else "<p>None.</p>"
        return (
            f'<details id="{panels.cell_id(run["module"], mask, data)}"><summary>'
            f"{markup.text(name)}: {run['changes']:,} changed</summary>"
            f'<p class="note">{markup.text(panels.describe_cell(self.results, run))}</p>'
            f"{shown}</details>"
        )


COLUMNS = ("neurons of", "tested on", "picture", "question", "right", "before", "after", "score")


def changed(results: Results) -> list[page.Widget]:
    """Return the list of changed answers; empty if nothing was ablated."""
    return [ChangedAnswers(results)] if _selected(results) else []


def write(folder: pathlib.Path, results: Results) -> tuple[str, str]:
    """Write `tables/changed_answers.csv`."""
    rows = [(run["module"], *row) for run in _selected(results) for row in _rows(results, run)]
    return parts.write_csv(folder, "changed_answers", ("module", *COLUMNS), rows)


def _selected(results: Results) -> list[Run]:
    return [run for run in results["ablation"] if run["control"] is None]


def _rows(results: Results, run: Run) -> list[list[str]]:
    """Return the changed answers of a cell as rows of text, by COLUMNS."""
    rows: list[list[str]] = []
    for change in run["changed"]:
        question = results["questions"][run["data"]][change["question"]]
        before, after = change["scores"]
        rows.append(
            [run["mask"], run["data"], question["id"], question["question"], question["answer"],
             change["before"], change["after"], f"{before:g} \N{RIGHTWARDS ARROW} {after:g}"]
        )  # fmt: skip
    return rows
