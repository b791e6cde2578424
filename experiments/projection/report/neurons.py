"""Sections of the report on neurons and their ablation."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.projection.report import cells, plots
from mllm_jax.report import page, parts, style
from mllm_jax.report.report import Results


def neurons(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the number of selected neurons; None if not measured."""
    rows = results.get("neurons")
    if not rows:
        return None
    by_module: dict[str, dict[str, dict[str, Any]]] = {}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    for row in rows:
        by_task = by_module.setdefault(parts.title(row["module"]), {})
        by_task.setdefault(row["task"], {}).setdefault(row["variant"], row)  # of the first seed
    figure = plots.migration(by_module, cells.colours(rows))

    def mean(variant: str, key: str) -> float:
        return float(np.mean([row[key] for row in rows if row["variant"] == variant]))

    variants = list(dict.fromkeys(row["variant"] for row in rows))
    columns = (
        "task", "variant", "module", "seed", "before", "after", "kept", "jaccard", "chance",
        "share_before", "share_after",
    )  # fmt: skip
    layers = [
        (*(row[c] for c in columns[:4]), layer, *counts)
        for row in rows
        for layer, counts in enumerate(
            zip(row["per_layer_before"], row["per_layer_after"], strict=True)
        )
    ]
    return page.Section(
        title="Domain neurons before and after",
        reading="A domain's neurons before and after fine-tuning share, by their Jaccard index, "
        + "; ".join(
            f"{mean(v, 'jaccard'):.2f} for {v} (by chance {mean(v, 'chance'):.2f})"
            for v in variants
        )
        + ", on average over tasks and modules.",
        figures=[
            parts.write_figure(folder, "neurons", figure, "Neurons kept, lost and gained by module")
        ],
        table=page.Table(
            ("task", "variant", "module", "before", "after", "kept", "Jaccard", "share before",
             "share after"),
            [
                (row["task"], row["variant"], parts.title(row["module"]), f"{row['before']:,}",
                 *(_over_seeds(rows, row, key) for key in ("after", "kept", "jaccard")),
                 cells.percent(row["share_before"]), _over_seeds(rows, row, "share_after"))
                for row in rows
                if row["seed"] == seeds[0]
            ],
        ),
        note="Shares are of the domain's neurons in all modules: where they differ, neurons moved "
        f"from module to module. {_read_seeds(seeds)}",
        data=[
            parts.write_csv(
                folder, "neurons", columns, [[row[c] for c in columns] for row in rows]
            ),
            parts.write_csv(
                folder, "neurons_per_layer", (*columns[:4], "layer", "before", "after"), layers
            ),
        ],
    )  # fmt: skip


def _over_seeds(rows: Sequence[cells.Row], like: cells.Row, key: str) -> str:
    """Return the mean of a value over seeds, with the lowest and the highest in brackets."""
    named = ("task", "variant", "module")
    values = [row[key] for row in rows if all(row[name] == like[name] for name in named)]
    form: Callable[[Any], str] = {
        "jaccard": "{:.2f}".format, "share_after": cells.percent,
    }.get(key, "{:,.0f}".format)  # fmt: skip
    mean = form(float(np.mean(values)))
    return f"{mean} ({form(min(values))}{page.DASH}{form(max(values))})" if values[1:] else mean


def _read_seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"After one fine-tuning of each kind, with seed {seeds[0]}."
    return (
        f"Means over {len(seeds)} fine-tunings of each kind, the lowest and the highest in "
        f"brackets; the figure shows seed {seeds[0]}."
    )


def ablation(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on scores without the selected neurons; None if not measured."""
    rows = [row for row in results.get("ablation", ()) if "recall" not in row]
    if not rows:
        return None
    kinds = list(dict.fromkeys(row["ablated"] for row in rows))
    return page.Section(
        title="Ablation of the neurons",
        reading="The model's macro-F1 changes, on average over tasks and variants, by "
        + ", by ".join(f"{_mean_change(rows, kind)} with {kind} ablated" for kind in kinds)
        + ".",
        figures=[
            parts.write_figure(
                folder, "ablation", _changes(rows, "variant"),
                "Change of macro-F1 by the neurons that are ablated",
            )
        ],
        table=page.Table(
            ("task", "variant", "ablated", "neurons", "macro-F1", "change of F1"),
            [
                (row["task"], row["variant"], row["ablated"], f"{row['neurons']:,}",
                 cells.value(row["f1"]), cells.change(row["change"]))
                for row in rows
            ],
        ),
        note=f"Intervals are paired by picture. {cells.MARKS} The models are those of seed "
        f"{results['seeds'][0]} alone.",
        data=[_ablation_csv(folder, "ablation", rows)],
    )  # fmt: skip


def suppression(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the recall of suppressed classes; None if not measured."""
    rows = [row for row in results.get("ablation", ()) if "recall" in row]
    if not rows:
        return None
    edited = [row for row in rows if row["change"]["value"] or row["neurons"]]
    first, *_ = edited
    changes = ", ".join(f"{row['ablated']} {page.signed(row['change']['value'])}" for row in edited)
    classes = list(first["recall"])
    return page.Section(
        title="Suppressing one class",
        reading=f"Two classes ({' and '.join(classes)}), {classes[0]} suppressed. Macro-F1 changes "
        f"by: {changes}.",
        figures=[
            parts.write_figure(
                folder, "suppression", _changes(edited, ""), "Change of macro-F1 by the edit"
            )
        ],
        table=page.Table(
            ("edit", "neurons", *(f"recall of {name}" for name in classes), "macro-F1",
             "change of F1"),
            [
                (row["ablated"], f"{row['neurons']:,}",
                 *(cells.percent(row["recall"][name]) for name in classes), cells.value(row["f1"]),
                 cells.change(row["change"]))
                for row in rows
            ],
        ),
        note="AurA (Suau et al. 2024) scales a neuron by 1 minus its advantage over chance at "
        "detecting the class; experts are the neurons of largest advantage, which are ablated.",
        data=[_ablation_csv(folder, "suppression", rows)],
    )  # fmt: skip


def _changes(rows: Sequence[cells.Row], group: str) -> Figure:
    """Draw the changes of F1 by ablation, a row of panels for each group."""
    kinds = list(dict.fromkeys(row["ablated"] for row in rows))
    colours = iter(style.PALETTE)
    hue = {
        kind: style.GREY if "random" in kind or "shuffled" in kind else next(colours)
        for kind in kinds
    }
    panels: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        change = row["change"]
        point = {"mean": change["value"], "low": change["low"], "high": change["high"]}
        by_task = panels.setdefault(row.get(group, ""), {})
        by_task.setdefault(row["task"], {})[row["ablated"]] = point
    return plots.forest(
        panels, hue, "change of macro-F1", against="0", format_value="{:+.2f}".format
    )


def _mean_change(rows: Sequence[cells.Row], kind: str) -> str:
    changes = [row["change"]["value"] for row in rows if row["ablated"] == kind]
    return page.signed(float(np.mean(changes)))


def _ablation_csv(folder: pathlib.Path, name: str, rows: Sequence[cells.Row]) -> tuple[str, str]:
    classes = list(rows[0].get("recall", ()))
    return parts.write_csv(
        folder, name,
        ("task", "variant", "ablated", "neurons", *cells.VALUE,
         *(f"change_{c}" for c in cells.CHANGE),
         *(f"recall_{c}" for c in classes)),
        [
            (row["task"], row["variant"], row["ablated"], row["neurons"],
             *cells.pick(row["f1"], cells.VALUE),
             *cells.pick(row["change"], cells.CHANGE), *(row["recall"][c] for c in classes))
            for row in rows
        ],
    )  # fmt: skip
