"""The report of distributed alignment search: figures, tables and a page."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import charts, learning, page, parts, style, tables


@style.styled
def interchange(rows: Sequence[Mapping]) -> Figure:
    """Draw interchange accuracy by layer: trained and random subspaces, and the full residual.

    Args:
      rows: The rows of results.json.
    """
    figure = Figure(figsize=(6, 3))
    ax = figure.subplots()
    styles = {"learned": (style.PALETTE[0], "-"), "whole": (style.INK, "--")}
    for kind in dict.fromkeys(row["subspace"] for row in rows):
        selected = [row for row in rows if row["subspace"] == kind]
        at, value, low, high = (
            np.array([row[key] for row in selected]) for key in ("layer", "accuracy", "low", "high")
        )
        colour, line = styles.get(kind, (style.GREY, "-"))
        errors = [value - low, high - value]
        ax.errorbar(at, value, errors, fmt="o" + line, markersize=4, color=colour, linewidth=1.2)
        ax.annotate(f"  {kind}", (at[-1], value[-1]), va="center", fontsize=8, color=colour)
    ax.set(xlabel="layer", ylabel="interchange accuracy", ylim=(-0.03, 1.03))
    ax.set_xticks(sorted({row["layer"] for row in rows}))
    ax.margins(x=0.12)
    ax.grid(axis="y")
    return figure


def panel(rows: Sequence[Mapping]) -> charts.Panel:
    """Return the same chart to hover over and to zoom."""
    keys = {"at": "layer", "mean": "accuracy", "low": "low", "high": "high"}
    by_name = charts.curves_of(rows, "subspace", keys)
    return charts.curves(
        "Interchange", by_name, style.palette(list(by_name)), "layer", "interchange accuracy"
    )


def write(workdir: str | os.PathLike, results: Mapping, losses: Mapping[int, np.ndarray]) -> None:
    """Write the figures, the tables and index.html.

    Args:
      workdir: The folder of the study.
      results: The content of results.json.
      losses: The loss of each step, by layer.
    """
    folder, rows = pathlib.Path(workdir), results["interchange"]
    figure = parts.write_figure(
        folder,
        "interchange",
        interchange(rows),
        "Interchange accuracy by layer",
        chart=[panel(rows)],
    )
    columns = ("layer", "subspace", "accuracy", "low", "high", "pairs")
    tables.write(
        folder / "tables/interchange.csv", columns, [[row[c] for c in columns] for row in rows]
    )
    best = max((row for row in rows if row["subspace"] == "learned"), key=lambda r: r["accuracy"])
    content = page.Page(
        title="Where the answer is stored",
        lead=f"Is there a subspace of {results['rank']} directions at the last token that stores "
        f"what {page.model_name(results)} answers to \u201c{results['prompt']}\u201d?",
        facts=[
            (f"{results['rank']}", "directions"),
            (f"{len(results['labels'])}", "answers"),
            (f"{best['pairs']}", "test pairs"),
        ],
        sections=[
            page.Section(
                title="Interchange",
                reading=f"At layer {best['layer']}, exchanging the learned subspace gives the "
                f"other picture's answer in {100 * best['accuracy']:.0f} % of the pairs.",
                figures=[figure],
                table=page.Table(
                    ("layer", "subspace", "accuracy", "interval"),
                    [(f"{row['layer']}", row["subspace"], f"{row['accuracy']:.2f}",
                      f"[{row['low']:.2f}, {row['high']:.2f}]") for row in rows],
                ),
                note="The model's own answers to both pictures differ in every pair, so without "
                "an exchange the accuracy is 0. Intervals: 95 % bootstrap over pairs.",
                data=[("interchange.csv", "tables/interchange.csv")],
            ),
            learning.section(folder, {f"layer {layer}": loss for layer, loss in losses.items()}),
        ],
        data=page.RECORDS,
    )  # fmt: skip
    page.write(folder / "index.html", content)
