"""Tables as CSV, whose floats read back exactly, as LaTeX and as Markdown."""

from __future__ import annotations

import csv
import io
import numbers
import pathlib
from collections.abc import Iterable, Sequence

from mllm_jax import store

# Characters at which a spreadsheet begins to read a formula.
FORMULAS = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}",
            "\N{FULLWIDTH HYPHEN-MINUS}", "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip

LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " ",
     "\N{MINUS SIGN}": "$-$", "<": r"\textless{}", ">": r"\textgreater{}",
     **{sign: rf"\{sign}" for sign in "&%$#_{}"}}
)  # fmt: skip


def write(path: str | pathlib.Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table as CSV, atomically.

    An apostrophe is added before text that a spreadsheet would evaluate as a formula, such as
    "=1+1". Numbers and their text are unchanged, negative ones as well.

    Args:
      path: The CSV file.
      columns: The names of the columns.
      rows: One value for each column; None becomes an empty field.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_escape_formula, columns))
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{path}: a row has {len(row)} values for {len(columns)} columns")
        writer.writerow(map(_escape_formula, row))
    store.write(path, text.getvalue())


def _escape_formula(cell: object) -> object:
    """Return a cell that a spreadsheet displays and does not evaluate."""
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


def latex(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Return a table for LaTeX's booktabs, with all text escaped.

    Args:
      columns: The names of the columns.
      rows: One text for each column.
      numeric: Whether each column is aligned right.
    """

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(LATEX) for cell in cells) + r" \\"

    alignment = "".join("r" if number else "l" for number in numeric)
    head = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", line(columns), r"\midrule"]
    return "\n".join([*head, *map(line, rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table whose columns are also aligned in a terminal.

    Args:
      head: The names of the columns.
      rows: One value for each column.
    """
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
