"""Tables: as CSV, with floats written so that they read back exactly, and as Markdown."""

from __future__ import annotations

import csv
import io
import numbers
import os
from collections.abc import Iterable, Sequence

from mllm_jax import store

FORMULAS = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}",
            "\N{FULLWIDTH HYPHEN-MINUS}", "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip


def write(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Writes one table atomically.

    A text that a spreadsheet would run as a formula, such as "=1+1", gets an apostrophe before it;
    numbers stay as they are, also negative ones, and texts of numbers.

    Args:
        path: the CSV file.
        columns: names, for the first line.
        rows: one value a column each; None becomes an empty field.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_inert, columns))
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{path}: a row of {len(row)} values under {len(columns)} columns")
        writer.writerow(map(_inert, row))
    store.write(path, text.getvalue())


def _inert(cell: object) -> object:
    """A cell that a spreadsheet shows and does not run."""
    if cell is None or isinstance(cell, numbers.Number):
        return cell
    text = str(cell)
    if not text.lstrip().startswith(FORMULAS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, padded so that it reads well on a terminal too.

    Args:
        head: names of the columns.
        rows: one value a column each.
    """
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
