"""The report of the dictionary study: figures, tables and a page."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import cards, charts, page, parts, style, tables

CURVES = {
    "unexplained": "share of variance not explained",
    "active": "active latents of a token",
    "dead": "share of dead latents",
}


@style.styled
def curves(by_name: Mapping[str, np.ndarray]) -> Figure:
    """Draw the curves of training by step, a panel for each."""
    figure = Figure(figsize=(11, 2.6))
    panels = figure.subplots(1, len(CURVES))
    for ax, (name, label) in zip(panels, CURVES.items(), strict=True):
        steps = np.arange(1, len(by_name[name]) + 1)
        ax.plot(steps, by_name[name], linewidth=1.2, color=style.PALETTE[0])
        ax.set(xlabel="step", ylabel=label, ylim=(0, None))
        ax.grid(axis="y")
    return figure


def write(workdir: str | os.PathLike, results: Mapping, by_name: Mapping[str, np.ndarray]) -> None:
    """Write the figures, the tables and index.html.

    Args:
      workdir: The folder of the study.
      results: The content of results.json.
      by_name: The curves of training.
    """
    folder = pathlib.Path(workdir)
    own = results["fidelity"][results["tokens"]]
    content = page.Page(
        title="A dictionary of the language model",
        lead=f"Can sums of few directions replace the activations of {page.model_name(results)} at "
        f"{results['tokens']} tokens in {results['site']}, layer {results['layer']}? A sparse "
        f"autoencoder ({results['kind']}) of {results['latents']:,} latents, trained in "
        f"{results['steps']:,} steps on {results['vectors']['train']:,} tokens.",
        facts=[
            (_share(results["losses"][results["tokens"]]["recovered"]["zero"]["value"]),
             "of the loss recovered on held-out pictures"),
            (_share(own["explained"]), "of the variance explained"),
            (f"{own['active']:.1f}", "active latents of a token"),
            (_share(own["dead"]), "of the latents dead"),
        ],
        sections=[
            _held_out(folder, results), _strongest(folder, results), _training(folder, by_name),
        ],
        data=page.RECORDS,
    )  # fmt: skip
    page.write(folder / "index.html", content)


def _share(value: float | None) -> str:
    return page.DASH if value is None else parts.percent(value)


def _held_out(folder: pathlib.Path, results: Mapping) -> page.Section:
    rows: list[tuple[Any, ...]] = []
    cells: list[tuple[str, ...]] = []
    for kind, losses in results["losses"].items():
        own, recovered = results["fidelity"][kind], losses["recovered"]
        rows.append(
            (kind, results["vectors"][kind], own["explained"], own["active"], own["dead"],
             *losses["mean_loss"].values(),
             *(value for interval in recovered.values() for value in interval.values()))
        )  # fmt: skip
        cells.append(
            (kind, _share(own["explained"]), f"{own['active']:.1f}", _share(own["dead"]),
             *(f"{value:.2f}" for value in losses["mean_loss"].values()),
             *map(_interval, recovered.values()))
        )  # fmt: skip
    columns = [
        *("tokens", "count", "explained", "active", "dead", "clean", "zero", "mean", "spliced"),
        *(f"recovered from {name}, {part}" for name in ("zero", "mean")
          for part in ("value", "low", "high")),
    ]  # fmt: skip
    tables.write(folder / "tables/held_out.csv", columns, rows)
    losses = results["losses"][results["tokens"]]
    return page.Section(
        title="On held-out pictures",
        reading=f"The loss of an answer is {losses['mean_loss']['spliced']:.2f} nats with the "
        f"reconstruction at the {results['tokens']} tokens, {losses['mean_loss']['clean']:.2f} "
        f"without edits, and {losses['mean_loss']['zero']:.2f} with zeros.",
        table=page.Table(
            ("tokens", "variance explained", "active latents", "dead", "loss, clean", "zeros",
             "mean", "reconstruction", "recovered from zeros", "recovered from the mean"),
            cells,
        ),
        note=f"The loss is that of the right answer to {results['questions']} questions, in nats. "
        "Recovered: the share of the damage of zeros, or of the mean vector, that the "
        "reconstruction in the same place avoids; 95 % bootstrap intervals over questions. Dead: "
        "active on no held-out token of the kind.",
        data=[("held_out.csv", "tables/held_out.csv")],
    )  # fmt: skip


def _interval(interval: Mapping[str, float | None]) -> str:
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return page.DASH
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _strongest(folder: pathlib.Path, results: Mapping) -> page.Section:
    entries = results["strongest"]
    domains = list(entries[0]["domains"])
    tables.write(
        folder / "tables/strongest.csv",
        ("latent", "energy", "rate", "mean", *domains, "words"),
        [(entry["latent"], entry["energy"], entry["rate"], entry["mean"],
          *entry["domains"].values(), " ".join(entry["words"])) for entry in entries],
    )  # fmt: skip
    widgets = [
        cards.Cards(
            f"Latent {entry['latent']}, mostly {max(entry['domains'], key=entry['domains'].get)}",
            [_card(token) for token in entry["top"]],
        )
        for entry in entries
        if entry["top"]
    ]
    return page.Section(
            title="The strongest latents",
            reading=f"{len(entries)} latents make {_share(sum(e['energy'] for e in entries))} of "
            "the squared values.",
            table=page.Table(
                ("latent", "energy", "active on", "mean value", "most often in", "words"),
                [(f"{entry['latent']}", f"{100 * entry['energy']:.1f} %",
                  f"{100 * entry['rate']:.1f} %", f"{entry['mean']:.2f}",
                  max(entry["domains"], key=entry["domains"].get),
                  " ".join(map(cards.visible, entry["words"]))) for entry in entries],
                sortable=True,
            ),
            note="Energy: the share of the sum of squared values; directions have norm 1. Words: "
            "those that the direction raises most, through the head alone. Below are the training "
            "pictures on which each latent is strongest, with the patch of the token.",
            widgets=widgets,
            data=[("strongest.csv", "tables/strongest.csv"), ("dictionary", "dictionary/cfg.json")],
    )  # fmt: skip


def _card(token: Mapping[str, Any]) -> cards.Card:
    box = cards.Box(token["row"], token["column"], token["rows"], token["columns"])
    return cards.Card(
        f"{token['value']:.2f}", image=token["image"],
        alt=f"Training picture {token['example']}, a patch marked", box=box,
    )  # fmt: skip


def _training(folder: pathlib.Path, by_name: Mapping[str, np.ndarray]) -> page.Section:
    steps = range(1, len(by_name["unexplained"]) + 1)
    panels = [
        charts.curves(label, {name: {"mean": by_name[name].tolist(), "at": steps}},
                      {name: style.PALETTE[0]}, "step", label)
        for name, label in CURVES.items()
    ]  # fmt: skip
    tables.write(
        folder / "tables/training.csv", ("step", *CURVES),
        [(step, *(float(by_name[name][step - 1]) for name in CURVES)) for step in steps],
    )  # fmt: skip
    return page.Section(
        title="Training",
        reading=f"The last step leaves {_share(float(by_name['unexplained'][-1]))} of the variance "
        "of its tokens unexplained.",
        figures=[parts.write_figure(folder, "training", curves(by_name), "Training by step",
                                    chart=panels)],
        data=[("training.csv", "tables/training.csv")],
    )  # fmt: skip
