"""Parts of the sections of a page: files of figures and tables, and numbers as text."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.analysis import power
from mllm_jax.report import charts, page, style, tables

VERDICTS = {"holds": "✓ holds", "fails": "✗ fails", "undecided": "? undecided"}
MODULE_TITLES = {
    "vision": "Vision encoder",
    "qformer": "Q-Former, text",
    "query": "Q-Former, queries",
    "projector": "Projector",
    "lm": "Language model",
    "all": "All modules",
}


def write_figure(
    folder: pathlib.Path,
    name: str,
    figure: Figure,
    alt: str,
    caption: str = "",
    chart: charts.Chart | None = None,
) -> page.Figure:
    """Write `figures/NAME.png` and `.svg`, and return their entry on the page.

    Args:
      folder: The folder of the study.
      name: The name of the files.
      figure: The figure.
      alt: The text for readers who cannot see it.
      caption: The text below it.
      chart: The same figure to hover over and to zoom.
    """
    png, svg = f"figures/{name}.png", f"figures/{name}.svg"
    for path in (png, svg):
        style.save(figure, folder / path)
    return page.Figure(
        png, alt, caption, round(100 * figure.get_figwidth()), chart, downloads=[("SVG", svg)]
    )


def write_csv(
    folder: pathlib.Path, name: str, columns: Sequence[str], rows: Iterable[Sequence]
) -> tuple[str, str]:
    """Write `tables/NAME.csv` and return its name and path."""
    path = f"tables/{name}.csv"
    tables.write(folder / path, columns, rows)
    return f"{name}.csv", path


def title(module: str) -> str:
    """Return the title of a module, or of several joined by +."""
    return MODULE_TITLES.get(module) or " + ".join(
        MODULE_TITLES.get(part, part) for part in module.split("+")
    )


def count_verdicts(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence on how many of a paper's claims hold."""
    count = {name: sum(row["verdict"] == name for row in claims) for name in VERDICTS}
    return (
        f"Verdicts on the paper's {len(claims)} claims at this sample size: "
        f"holds {count['holds']}, fails {count['fails']}, undecided {count['undecided']}."
    )


def beyond(run: Mapping[str, Any]) -> bool:
    """Return whether an ablation of domain neurons is beyond chance, corrected."""
    return run["control"] is None and run["p_holm"] <= power.LEVEL


def join_words(words: Sequence[str]) -> str:
    """Join words by commas, and the last one by 'and'."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def points(differences: np.ndarray) -> str:
    """Return the mean difference of accuracies in percentage points; a dash for none."""
    differences = differences[~np.isnan(differences)]
    return (
        f"{100 * differences.mean():+.1f}".replace("-", page.MINUS)
        if differences.size
        else page.DASH
    )


def two_digits(value: float) -> str:
    """Return a number with two significant digits and no exponent."""
    decimals = 1 - math.floor(math.log10(value)) if value else 0
    return f"{value:.{max(decimals, 0)}f}"
