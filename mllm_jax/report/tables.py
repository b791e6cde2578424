"""Tables: as CSV, with floats written so that they read back exactly, and as Markdown."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence

from mllm_jax import store


def write(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Writes one table atomically.

    Args:
        path: the CSV file.
        columns: names, for the first line.
        rows: one value a column each; None becomes an empty field.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{path}: a row of {len(row)} values under {len(columns)} columns")
        writer.writerow(row)
    store.write(path, text.getvalue())


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
