"""The reports of what was learned of an edit: masks, and subspaces by alignment search."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import figures, page, tables


@figures.styled
def curves(losses: Mapping[str, np.ndarray]) -> Figure:
    """Loss by step, with the name of each curve at its end."""
    figure = Figure(figsize=(6, 3))
    ax = figure.subplots()
    for (name, loss), colour in zip(losses.items(), figures.palette(list(losses)).values()):
        steps = np.arange(1, len(loss) + 1)
        ax.plot(steps, loss, linewidth=1.2, color=colour)
        ax.annotate(f" {name}", (steps[-1], loss[-1]), va="center", fontsize=8, color=colour)
    ax.set(xlabel="step", ylabel="loss, nats", ylim=(0, None))
    ax.grid(axis="y")
    return figure


@figures.styled
def layers(counts: Sequence[int], units: int) -> Figure:
    """Units that a mask keeps, by layer."""
    figure = Figure(figsize=(6, 3))
    ax = figure.subplots()
    ax.bar(np.arange(len(counts)), counts, width=0.8, color=figures.PALETTE[0])
    ax.set(xlabel="layer", ylabel=f"units kept, of {units:,}")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(axis="y")
    return figure


@figures.styled
def interchange(rows: Sequence[Mapping]) -> Figure:
    """Interchange accuracy by layer: learned and random subspaces, and the whole residual.

    Args:
        rows: as in results.json.
    """
    figure = Figure(figsize=(6, 3))
    ax = figure.subplots()
    look = {"learned": (figures.PALETTE[0], "-"), "whole": (figures.INK, "--")}
    for kind in dict.fromkeys(row["subspace"] for row in rows):
        mine = [row for row in rows if row["subspace"] == kind]
        at, value, low, high = (
            np.array([row[key] for row in mine]) for key in ("layer", "accuracy", "low", "high")
        )
        colour, line = look.get(kind, (figures.GREY, "-"))
        spread = [value - low, high - value]
        ax.errorbar(at, value, spread, fmt="o" + line, markersize=4, color=colour, linewidth=1.2)
        ax.annotate(f"  {kind}", (at[-1], value[-1]), va="center", fontsize=8, color=colour)
    ax.set(xlabel="layer", ylabel="interchange accuracy", ylim=(-0.03, 1.03))
    ax.set_xticks(sorted({row["layer"] for row in rows}))
    ax.margins(x=0.12)
    ax.grid(axis="y")
    return figure


def write_mask(workdir: str | os.PathLike, results: Mapping, curve: np.ndarray) -> None:
    """Writes figures, tables and index.html of a mask; see `experiments/mask.py`."""
    folder = pathlib.Path(workdir)
    counts, test = results["kept_by_layer"], results["test"]
    figures.save(layers(counts, results["units"]), folder / "figures/kept.png")
    tables.write(folder / "tables/kept.csv", ("layer", "kept"), enumerate(counts))
    measures = ("divergence", "agreement")
    rows = [
        (mask, *(value for measure in measures for value in found[measure].values()))
        for mask, found in test.items()
    ]
    head = [f"{measure}, {part}" for measure in measures for part in ("mean", "low", "high")]
    tables.write(folder / "tables/test.csv", ("mask", *head), rows)
    every = results["layers"] * results["units"]
    mine = test["learned"]
    content = page.Page(
        title="What the answer needs",
        lead=f"How few units of {results['site']} of {page.edited(results)} give the same next "
        f"word? Gates ({results['gate'].replace('_', ' ')}) learned in {results['steps']} steps.",
        facts=[
            (f"{results['kept']:,}", f"of {every:,} units kept"),
            (f"{100 * mine['agreement']['mean']:.0f} %", "of test questions say the same word"),
        ],
        sections=[
            page.Section(
                title="The mask",
                reading=f"{100 * results['kept'] / every:.1f} % of the units are kept; layer "
                f"{int(np.argmax(counts))} keeps most.",
                figures=[page.Figure("figures/kept.png", "Units kept by layer")],
                data=[("kept.csv", "tables/kept.csv"), ("off.npy", "off.npy")],
            ),
            page.Section(
                title="On test questions",
                reading=f"With the mask, the next word is {mine['divergence']['mean']:.2f} nats "
                "from that of the whole model.",
                table=page.Table(
                    ("mask", "divergence, nats", "same word"),
                    [(mask, f"{found['divergence']['mean']:.2f}",
                      f"{found['agreement']['mean']:.2f}") for mask, found in test.items()],
                ),
                note="Random masks keep as many units in every layer. Divergence: KL from the "
                "whole model, mean over questions.",
                data=[("test.csv", "tables/test.csv")],
            ),
            _learning(folder, {"gates": curve}),
        ],
        data=page.RECORDS,
    )  # fmt: skip
    page.write(folder / "index.html", content)


def write_das(
    workdir: str | os.PathLike, results: Mapping, losses: Mapping[int, np.ndarray]
) -> None:
    """Writes figures, tables and index.html of an alignment search; see `experiments/das.py`."""
    folder, rows = pathlib.Path(workdir), results["interchange"]
    figures.save(interchange(rows), folder / "figures/interchange.png")
    columns = ("layer", "subspace", "accuracy", "low", "high", "pairs")
    tables.write(
        folder / "tables/interchange.csv", columns, [[row[c] for c in columns] for row in rows]
    )
    best = max((row for row in rows if row["subspace"] == "learned"), key=lambda r: r["accuracy"])
    content = page.Page(
        title="Where the answer is stored",
        lead=f"Is there a subspace of {results['rank']} directions at the last token that holds "
        f"what {page.edited(results)} answers to \u201c{results['prompt']}\u201d?",
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
                figures=[
                    page.Figure("figures/interchange.png", "Interchange accuracy by layer")
                ],
                table=page.Table(
                    ("layer", "subspace", "accuracy", "interval"),
                    [(f"{row['layer']}", row["subspace"], f"{row['accuracy']:.2f}",
                      f"[{row['low']:.2f}, {row['high']:.2f}]") for row in rows],
                ),
                note="The model's own answers to both pictures differ in every pair, so without "
                "an exchange the accuracy is 0. Intervals: 95 % bootstrap over pairs.",
                data=[("interchange.csv", "tables/interchange.csv")],
            ),
            _learning(folder, {f"layer {layer}": loss for layer, loss in losses.items()}),
        ],
        data=page.RECORDS,
    )  # fmt: skip
    page.write(folder / "index.html", content)


def _learning(folder: pathlib.Path, losses: Mapping[str, np.ndarray]) -> page.Section:
    figures.save(curves(losses), folder / "figures/loss.png")
    tables.write(
        folder / "tables/loss.csv", ("of", "step", "loss"),
        [(name, step, float(value)) for name, loss in losses.items()
         for step, value in enumerate(loss, 1)],
    )  # fmt: skip
    return page.Section(
        title="Learning",
        reading="The loss of every step.",
        figures=[page.Figure("figures/loss.png", "Loss by step")],
        data=[("loss.csv", "tables/loss.csv")],
    )
