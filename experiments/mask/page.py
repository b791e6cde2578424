"""The report of the mask study: figures, tables and a page."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import charts, learning, page, parts, style, tables


@style.styled
def layers(counts: Sequence[int], units: int) -> Figure:
    """Draw the number of units that a mask keeps, by layer."""
    figure = Figure(figsize=(6, 3))
    ax = figure.subplots()
    ax.bar(np.arange(len(counts)), counts, width=0.8, color=style.PALETTE[0])
    ax.set(xlabel="layer", ylabel=f"units kept, of {units:,}")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True))
    ax.grid(axis="y")
    return figure


def write(workdir: str | os.PathLike, results: Mapping, curve: np.ndarray) -> None:
    """Write the figures, the tables and index.html.

    Args:
      workdir: The folder of the study.
      results: The content of results.json.
      curve: The loss of each step.
    """
    folder = pathlib.Path(workdir)
    counts, test = results["kept_by_layer"], results["test"]
    panel = charts.bars(
        "Units kept", {"kept": counts}, {"kept": style.PALETTE[0]}, "layer", "units"
    )
    figure = parts.write_figure(
        folder, "kept", layers(counts, results["units"]), "Units kept by layer", chart=[panel]
    )
    tables.write(folder / "tables/kept.csv", ("layer", "kept"), enumerate(counts))
    measures = ("divergence", "agreement")
    rows = [
        (mask, *(value for measure in measures for value in values[measure].values()))
        for mask, values in test.items()
    ]
    head = [f"{measure}, {part}" for measure in measures for part in ("mean", "low", "high")]
    tables.write(folder / "tables/test.csv", ("mask", *head), rows)
    every = results["layers"] * results["units"]
    trained = test["learned"]
    content = page.Page(
        title="The units needed for the answer",
        lead=f"How few units of {results['site']} of {page.model_name(results)} give the same next "
        f"word? Gates ({results['gate'].replace('_', ' ')}) trained in {results['steps']} steps.",
        facts=[
            (f"{results['kept']:,}", f"of {every:,} units kept"),
            (f"{100 * trained['agreement']['mean']:.0f} %", "of test questions say the same word"),
        ],
        sections=[
            page.Section(
                title="The mask",
                reading=f"{100 * results['kept'] / every:.1f} % of the units are kept; layer "
                f"{int(np.argmax(counts))} keeps most.",
                figures=[figure],
                data=[("kept.csv", "tables/kept.csv"), ("off.npy", "off.npy")],
            ),
            page.Section(
                title="On test questions",
                reading=f"With the mask, the next word is {trained['divergence']['mean']:.2f} nats "
                "from that of the full model.",
                table=page.Table(
                    ("mask", "divergence, nats", "same word"),
                    [(mask, f"{values['divergence']['mean']:.2f}",
                      f"{values['agreement']['mean']:.2f}") for mask, values in test.items()],
                ),
                note="Random masks keep equally many units in every layer. Divergence: the KL "
                "divergence from the full model, mean over questions.",
                data=[("test.csv", "tables/test.csv")],
            ),
            learning.section(folder, {"gates": curve}),
        ],
        data=page.RECORDS,
    )  # fmt: skip
    page.write(folder / "index.html", content)
