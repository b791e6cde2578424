"""What a sweep over layers shows: a grid of effects, and the page around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import figures, page
from mllm_jax.store import Workdir

QUESTION = {
    "tokens": "Which tokens carry the answer at which layer? Their residual is replaced by that of "
    "another picture with the same question.",
    "heads": "Which attention heads does the answer need? One at a time is off.",
    "parts": "Which layers' attention and MLP does the answer need? One at a time is off.",
    "strengths": "How much of each layer's MLP does the answer need? It is scaled.",
}


@figures.styled
def grid(effect: np.ndarray, columns: Sequence[str], low: np.ndarray, high: np.ndarray) -> Figure:
    """Effects by layer (upwards) and column; a dot marks intervals that exclude zero.

    Args:
        effect: float[L, columns], nats of log-odds.
        low: float[L, columns], nats of log-odds.
        high: float[L, columns], nats of log-odds.
    """
    layers, count = effect.shape
    figure = Figure(figsize=(max(4.2, 1.8 + 0.42 * count), max(3.2, 1.2 + 0.16 * layers)))
    ax = figure.subplots()
    limit = max(float(np.abs(effect).max()), 1e-9)
    drawn = ax.imshow(effect, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    at = np.argwhere((low > 0) | (high < 0))
    ax.plot(at[:, 1], at[:, 0], ".", color=figures.INK, markersize=2)
    ax.set_xticks(range(count), columns, rotation=60 if max(map(len, columns)) > 3 else 0,
                  ha="right" if max(map(len, columns)) > 3 else "center")  # fmt: skip
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(drawn, ax=ax, shrink=0.6)
    bar.set_label("change of log-odds, nats")
    bar.outline.set_visible(False)
    return figure


def write(workdir: Workdir, results: Mapping) -> None:
    """Writes `index.html` for a finished sweep; see `experiments/sweep.py` for the keys."""
    effect = np.array(results["effect"])
    layer, column = np.unravel_index(np.abs(effect).argmax(), effect.shape)
    sure = (np.array(results["low"]) > 0) | (np.array(results["high"]) < 0)
    reading = (
        f"The largest change, {effect[layer, column]:+.2f} nats, is at layer {layer}, "
        f"{results['columns'][column]}; {int(sure.sum())} of {sure.size} cells have an interval "
        "that excludes zero."
    )
    page.write(
        workdir / "index.html",
        page.Page(
            title=f"Sweep over layers and {results['grid']}",
            lead=QUESTION[results["grid"]],
            facts=[(f"{results['pairs']}", "pairs of pictures"), (f"{sure.size:,}", "edits"),
                   (f"{len(results['domains'])}", "domains")],
            sections=[
                page.Section(
                    title="Effect on the answer",
                    reading=reading,
                    figures=[page.Figure("figures/grid.png", "Effects by layer and column")],
                    data=[("grid.csv", "grid.csv")],
                    note="Change of the log-odds of the picture's own answer against its "
                    "partner's, first answer token, mean over pairs; dots: the 95 % bootstrap "
                    "interval over pairs excludes zero, each cell on its own.",
                )
            ],
            data=page.RECORDS,
        ),
    )  # fmt: skip
