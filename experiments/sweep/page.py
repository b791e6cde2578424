"""The report of the sweep: the grid of effects as a figure, a table and a page."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import charts, page, parts, style, tables

QUESTIONS = {
    "tokens": "Which tokens carry the answer at which layer? Their residual is replaced by that of "
    "another picture with the same question.",
    "heads": "Which attention heads does the answer need? One head at a time is ablated.",
    "parts": "Which layers' attention and MLP does the answer need? One at a time is ablated.",
    "strengths": "How much of each layer's MLP does the answer need? It is scaled.",
}


@style.styled
def grid(effect: np.ndarray, columns: Sequence[str], low: np.ndarray, high: np.ndarray) -> Figure:
    """Draw effects by layer (bottom to top) and column; a dot marks intervals that exclude zero.

    Args:
      effect: float[L, columns], nats of log-odds.
      columns: The names of the columns.
      low: float[L, columns], the lower ends of the intervals.
      high: float[L, columns], the upper ends.
    """
    layers, count = effect.shape
    figure = Figure(figsize=(max(4.2, 1.8 + 0.42 * count), max(3.2, 1.2 + 0.16 * layers)))
    ax = figure.subplots()
    limit = max(float(np.abs(effect).max()), 1e-9)
    image = ax.imshow(effect, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    at = np.argwhere((low > 0) | (high < 0))
    ax.plot(at[:, 1], at[:, 0], ".", color=style.INK, markersize=2)
    ax.set_xticks(range(count), columns, rotation=60 if max(map(len, columns)) > 3 else 0,
                  ha="right" if max(map(len, columns)) > 3 else "center")  # fmt: skip
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=ax, shrink=0.6)
    bar.set_label("change of log-odds, nats")
    bar.outline.set_visible(False)
    return figure


def panel(
    effect: np.ndarray, columns: Sequence[str], low: np.ndarray, high: np.ndarray
) -> charts.Panel:
    """Return the figure of `grid` as an interactive panel."""
    limit = max(float(np.abs(effect).max()), 1e-9)
    layers = [str(layer) for layer in range(len(effect))][::-1]
    hovers = [
        [f"layer {layer}, {name}: {effect[layer, i]:+.3f} nats "
         f"[{low[layer, i]:+.3f}, {high[layer, i]:+.3f}]" for i, name in enumerate(columns)]
        for layer in map(int, layers)
    ]  # fmt: skip
    return charts.matrix(
        "Change of log-odds, nats", effect[::-1], layers, columns, bounds=(-limit, limit),
        colours="changes", texts=[[""] * len(columns)] * len(layers), hovers=hovers, y="layer",
    )  # fmt: skip


def write(workdir: str | os.PathLike, results: Mapping) -> None:
    """Write `grid.csv`, `figures/grid.png`, `.svg` and `index.html`.

    Args:
      workdir: The folder of the study.
      results: The content of results.json.
    """
    folder, names = pathlib.Path(workdir), results["columns"]
    effect, low, high = (np.array(results[key]) for key in ("effect", "low", "high"))
    tables.write(
        folder / "grid.csv", ("layer", "column", "effect", "low", "high"),
        [(layer, name, float(effect[layer, i]), float(low[layer, i]), float(high[layer, i]))
         for layer in range(len(effect)) for i, name in enumerate(names)],
    )  # fmt: skip
    figure = parts.write_figure(
        folder, "grid", grid(effect, names, low, high), "Effects by layer and column",
        chart=[panel(effect, names, low, high)],
    )  # fmt: skip
    layer, column = np.unravel_index(np.abs(effect).argmax(), effect.shape)
    sure = (low > 0) | (high < 0)
    reading = (
        f"The largest change, {effect[layer, column]:+.2f} nats, is at layer {layer}, "
        f"{names[column]}; {int(sure.sum())} of {sure.size} cells have an interval "
        "that excludes zero."
    )
    page.write(
        folder / "index.html",
        page.Page(
            title=f"Sweep over layers and {results['grid']}",
            lead=QUESTIONS[results["grid"]],
            facts=[(f"{results['pairs']}", "pairs of pictures"), (f"{sure.size:,}", "edits"),
                   (f"{len(results['domains'])}", "domains")],
            sections=[
                page.Section(
                    title="Effect on the answer",
                    reading=reading,
                    figures=[figure],
                    data=[("grid.csv", "grid.csv")],
                    note="The change of the log-odds of the picture's own answer against its "
                    "partner's, at the first answer token, mean over pairs. A dot marks a cell "
                    "whose 95 % bootstrap interval over pairs excludes zero, without a correction "
                    "for the number of cells.",
                )
            ],
            data=page.RECORDS,
        ),
    )  # fmt: skip
