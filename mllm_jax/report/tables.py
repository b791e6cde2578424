"""Tables as CSV, with floats written so that they read back exactly."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence

from mllm_jax import workdir


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
    workdir.write(path, text.getvalue())
