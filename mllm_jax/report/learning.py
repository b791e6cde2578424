"""The section of a page on training: the loss of each step."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import charts, page, parts, style, tables


@style.styled
def curves(losses: Mapping[str, np.ndarray]) -> Figure:
    """Draw the loss by step, with the name of each curve at its end."""
    figure = Figure(figsize=(6, 3))
    ax = figure.subplots()
    for (name, loss), colour in zip(losses.items(), style.palette(list(losses)).values()):
        steps = np.arange(1, len(loss) + 1)
        ax.plot(steps, loss, linewidth=1.2, color=colour)
        ax.annotate(f" {name}", (steps[-1], loss[-1]), va="center", fontsize=8, color=colour)
    ax.set(xlabel="step", ylabel="loss, nats", ylim=(0, None))
    ax.grid(axis="y")
    return figure


def section(folder: pathlib.Path, losses: Mapping[str, np.ndarray]) -> page.Section:
    """Write the figure and the table of the losses, and return the section that shows them.

    Args:
      folder: The folder of the study.
      losses: The loss of each step, by the name of what is trained.
    """
    by_name: dict[str, dict[str, Sequence[float]]] = {
        name: {"mean": loss.tolist(), "at": range(1, len(loss) + 1)}
        for name, loss in losses.items()
    }
    panel = charts.curves("Loss", by_name, style.palette(list(losses)), "step", "loss, nats")
    tables.write(
        folder / "tables/loss.csv", ("name", "step", "loss"),
        [(name, step, float(value)) for name, loss in losses.items()
         for step, value in enumerate(loss, 1)],
    )  # fmt: skip
    return page.Section(
        title="Training",
        reading="The loss of each training step.",
        figures=[parts.write_figure(folder, "loss", curves(losses), "Loss by step", chart=[panel])],
        data=[("loss.csv", "tables/loss.csv")],
    )
