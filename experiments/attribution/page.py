"""The report of the attribution study: figures, tables and a page."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import charts, page, parts, style, tables

METRICS = {
    "answer": "the log-likelihood of the right answer",
    "difference": "the log-likelihood of the right answer minus that of a wrong option",
}


@style.styled
def by_layer(layers: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw attributions by layer, a panel per domain: positive above zero, negative below.

    Args:
      layers: {domain: {"for": float[L], "against": float[L]}}, nats per question.
    """
    hue = style.palette(list(layers))
    figure = Figure(figsize=(11, 2.6))
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for ax, (domain, sums) in zip(panels, layers.items(), strict=True):
        layer_numbers = np.arange(len(sums["for"]))
        ax.bar(layer_numbers, sums["for"], width=0.8, color=hue[domain])
        ax.bar(layer_numbers, sums["against"], width=0.8, color=style.GREY)
        ax.axhline(0, color=style.INK, linewidth=0.6)
        ax.set(title=domain, xlabel="layer")
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
        ax.grid(axis="y")
    panels[0].set_ylabel("nats per question")
    return figure


@style.styled
def ablation(rows: Sequence[Mapping]) -> Figure:
    """Draw the change of the metric by the number of ablated units; random units are grey.

    Args:
      rows: The rows of results.json.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    hue = style.palette(domains)
    figure = Figure(figsize=(11, 2.6))
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for ax, domain in zip(panels, domains, strict=True):
        selected = [row for row in rows if row["domain"] == domain]
        for units in dict.fromkeys(row["units"] for row in selected):
            line = [row for row in selected if row["units"] == units]
            count, change, low, high = (
                np.array([row[key] for row in line]) for key in ("ablated", "change", "low", "high")
            )
            colour = hue[domain] if units == "top" else style.GREY
            ax.plot(count, change, "o-", markersize=3.5, color=colour)
            ax.fill_between(count, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axhline(0, color=style.INK, linewidth=0.6)
        ax.set(title=domain, xscale="log", xlabel="units ablated")
        counts = sorted({row["ablated"] for row in selected})
        ax.set_xticks(counts, [f"{count:,}" for count in counts])
        ax.minorticks_off()
        ax.grid(axis="y")
    panels[0].set_ylabel("change, nats per question")
    return figure


def write(workdir: str | os.PathLike, results: Mapping) -> None:
    """Write the figures, the tables and index.html.

    Args:
      workdir: The folder of the study.
      results: The content of results.json.
    """
    folder = pathlib.Path(workdir)
    method = (
        f"integrated gradients of {results['steps']} steps"
        if results["steps"]
        else "the first-order approximation"
    )
    page.write(
        folder / "index.html",
        page.Page(
            title="Attribution of the answer",
            lead=f"How much does each unit of {results['site']} of {page.model_name(results)} "
            f"contribute to {METRICS[results['metric']]}? The attributions of all units come from "
            f"one backward pass, by {method}.",
            facts=[
                (f"{results['layers'] * results['units']:,}", "units"),
                (f"{sum(results['examples'].values()):,}", "questions"),
                (f"{len(results['domains'])}", "domains"),
            ],
            sections=[_layers(folder, results), _top(folder, results), _ablation(folder, results)],
            data=[(name, name) for name in ("results.json", "attribution.npz", "manifest.json")],
        ),
    )


def _layers(folder: pathlib.Path, results: Mapping) -> page.Section:
    layers = results["by_layer"]
    hue = {"for": style.PALETTE[0], "against": style.GREY}
    chart = [
        charts.bars(domain, sums, hue, "layer", "nats per question")
        for domain, sums in layers.items()
    ]
    figure = parts.write_figure(
        folder, "by_layer", by_layer(layers), "Attribution by layer and domain", chart=chart
    )
    tables.write(
        folder / "tables/by_layer.csv", ("domain", "layer", "for", "against"),
        [(domain, layer, *values) for domain, sums in layers.items()
         for layer, values in enumerate(zip(sums["for"], sums["against"], strict=True))],
    )  # fmt: skip
    total = np.sum([sums["for"] for sums in layers.values()], 0)
    return page.Section(
        title="By layer",
        reading=f"Layer {total.argmax()} has the largest share of the positive attributions, "
        f"{100 * total.max() / max(total.sum(), 1e-12):.0f} %.",
        figures=[figure],
        table=page.Table(
            ("domain", "questions", "metric", "sum of attributions", "all gates closed"),
            [(domain, f"{results['examples'][domain]}",
              *(page.signed(sums[key]) for key in ("metric", "sum", "change")))
             for domain, sums in results["completeness"].items()],
        ),
        note="Colour: positive attributions; grey: negative ones. Integrated gradients of enough "
        "steps add up to the drop of the metric when all gates are closed.",
        data=[("by_layer.csv", "tables/by_layer.csv")],
    )  # fmt: skip


def _top(folder: pathlib.Path, results: Mapping) -> page.Section:
    rows = [
        (domain, rank, *unit)
        for domain, units in results["top"].items()
        for rank, unit in enumerate(units, 1)
    ]
    tables.write(
        folder / "tables/top_units.csv", ("domain", "rank", "layer", "unit", "attribution"), rows
    )
    unit_sets = [{(layer, unit) for layer, unit, _ in units} for units in results["top"].values()]
    common = len(set.intersection(*unit_sets))
    return page.Section(
        title="The top units",
        reading=f"{common} of the top {len(unit_sets[0])} units are the same in every domain.",
        table=page.Table(
            ("domain", "rank", "layer", "unit", "nats"),
            [(row[0], *map(str, row[1:4]), page.signed(row[4])) for row in rows if row[1] <= 5],
        ),
        data=[("top_units.csv", "tables/top_units.csv")],
    )


def _ablation(folder: pathlib.Path, results: Mapping) -> page.Section:
    rows = results["ablation"]
    figure = parts.write_figure(
        folder, "ablation", ablation(rows),
        "Change of the metric by the number of ablated units", chart=_ablation_panels(rows),
    )  # fmt: skip
    columns = ("domain", "ablated", "units", "clean", "change", "low", "high", "n")
    tables.write(
        folder / "tables/ablation.csv", columns, [[row[c] for c in columns] for row in rows]
    )
    most = max(row["ablated"] for row in rows)
    last = [row for row in rows if row["ablated"] == most]
    top, random = (
        np.mean([row["change"] for row in last if (row["units"] == "top") == is_top] or [np.nan])
        for is_top in (True, False)
    )
    return page.Section(
        title="Validation by ablation",
        reading=f"With the top {most:,} units ablated, the metric changes by {page.signed(top)} "
        f"nats on test questions; with equally many random units of the same layers, by "
        f"{page.signed(random)}.",
        figures=[figure],
        note="Colour: units chosen on training questions; grey: random units. Bands: 95 % "
        "bootstrap intervals over questions.",
        data=[("ablation.csv", "tables/ablation.csv")],
    )


def _ablation_panels(rows: Sequence[Mapping]) -> charts.Chart:
    """Return the changes by the number of ablated units, a panel for each domain."""
    keys = {"at": "ablated", "mean": "change", "low": "low", "high": "high"}
    chart: list[charts.Panel] = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        selected = [row for row in rows if row["domain"] == domain]
        by_units = charts.curves_of(selected, "units", keys)
        hue = style.palette(list(by_units))
        panel = charts.curves(domain, by_units, hue, "units ablated", "change, nats per question")
        chart.append(dataclasses.replace(panel, layout={"xaxis": {"type": "log"}}))
    return chart
