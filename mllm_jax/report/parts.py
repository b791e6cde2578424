"""What the sections of a page are made of: figures and tables as files, numbers as text."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import page, style, tables

FORMAT = 1  # version of results.json; raised when keys change
NAMES = {
    "vision": "Vision encoder",
    "qformer": "Q-Former, text",
    "query": "Q-Former, queries",
    "projector": "Projector",
    "lm": "Language model",
    "all": "All modules",
}


def require(results: Mapping, keys: Sequence[str], study: str) -> None:
    """Refuse the results of a study that lack some of its keys, or have another format."""
    if missing := [key for key in keys if key not in results]:
        raise ValueError(f"results of {study} lack {', '.join(missing)}; run the study again")
    if results.get("format") != FORMAT:
        raise ValueError(
            f"results of {study} have format {results.get('format')}, and this version reads "
            f"{FORMAT}; run the study again"
        )


def png(
    folder: pathlib.Path, name: str, figure: Figure, alt: str, caption: str = ""
) -> page.Figure:
    """Writes figures/NAME.png."""
    path = f"figures/{name}.png"
    style.save(figure, folder / path)
    return page.Figure(path, alt, caption, width=round(100 * figure.get_figwidth()))


def csv(
    folder: pathlib.Path, name: str, columns: Sequence[str], rows: Iterable[Sequence]
) -> tuple[str, str]:
    """Writes tables/NAME.csv."""
    path = f"tables/{name}.csv"
    tables.write(folder / path, columns, rows)
    return f"{name}.csv", path


def name(module: str) -> str:
    """A module, or several joined by +, as a title has it."""
    return NAMES.get(module) or " + ".join(NAMES.get(part, part) for part in module.split("+"))


def listed(words: Sequence[str]) -> str:
    """Join words by commas and a last 'and'."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def percent(share: float) -> str:
    """Return a share in per cent as text."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def points(differences: np.ndarray) -> str:
    """Mean difference of accuracy in percentage points; a dash where nothing was measured."""
    differences = differences[~np.isnan(differences)]
    return (
        f"{100 * differences.mean():+.1f}".replace("-", page.MINUS)
        if differences.size
        else page.DASH
    )


def small(value: float) -> str:
    """Two digits, never an exponent."""
    decimals = 1 - math.floor(math.log10(value)) if value else 0
    return f"{value:.{max(decimals, 0)}f}"
