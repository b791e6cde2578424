"""Sections of the report on scores of answers and of probes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.projection.report import cells, plots
from mllm_jax.analysis.projection import BEFORE, E2E, ORIGINAL, PAPER, PROJ
from mllm_jax.report import charts, page, parts, style
from mllm_jax.report.report import Results


def answers(folder: pathlib.Path, results: Results) -> page.Section:
    """Build the section on the scores of the answers by task and variant."""
    rows = results["answers"]
    by_task = cells.group(rows, "task", "variant")
    hue = cells.colours(rows)
    figure = plots.forest(
        {"": {task: {v: row["f1"] for v, row in by_variant.items()}
              for task, by_variant in by_task.items()}},
        hue, "macro-F1", against=ORIGINAL,
    )  # fmt: skip
    above = {v: sum(_above(row) for row in rows if row["variant"] == v) for v in (PROJ, E2E)}
    return page.Section(
        title="Answers of the model",
        reading=f"Zero-shot, the model's macro-F1 is {_mean(rows, ORIGINAL)} on average over "
        f"tasks; with its projector tuned {_mean(rows, PROJ)}, tuned end to end "
        f"{_mean(rows, E2E)}. The interval of the change lies above zero in {above[PROJ]} of "
        f"{len(by_task)} tasks for {PROJ}, in {above[E2E]} for {E2E}.",
        figures=[
            parts.write_figure(
                folder, "answers", figure, "Macro-F1 by task and variant", chart=_panels(rows)
            )
        ],
        table=page.Table(
            ("task", "variant", "runs", "macro-F1", "interval", "accuracy", "change of F1"),
            [
                (row["task"], row["variant"], f"{row['runs']}", cells.value(row["f1"]),
                 _interval(row["f1"]), cells.value(row["accuracy"]), cells.change(row["change"]))
                for row in rows
            ],
        ),
        note="± is the standard deviation of the runs. Intervals are 95 % bootstraps over test "
        f"pictures and runs; the dashed line is the original model. {cells.MARKS} "
        f"{cells.one_seed(results)}Table 1 of the paper.",
        data=[_rows_csv(folder, "answers", ("task",), rows)],
    )  # fmt: skip


def richness(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on probes before and after the projector; None if not measured."""
    rows = results["richness"]
    if not rows:
        return None
    by_probe: dict[str, list[cells.Row]] = {}
    for row in rows:
        by_probe.setdefault(row["probe"], []).append(row)
    figure = plots.forest(
        {
            f"{probe} probe": {
                task: {v: row["f1"] for v, row in by_variant.items()}
                for task, by_variant in cells.group(own, "task", "variant").items()
            }
            for probe, own in by_probe.items()
        },
        cells.colours(rows), "macro-F1 of the probe", against=ORIGINAL,
    )  # fmt: skip
    own = by_probe.get(PAPER) or rows
    equal = (
        f" With one probe for both sides, {_mean(by_probe['matched'], BEFORE)} before and "
        f"{_mean(by_probe['matched'], ORIGINAL)} after it."
        if "matched" in by_probe
        else ""
    )
    return page.Section(
        title="Scores of the probes",
        reading=f"The paper's probes reach a macro-F1 of {_mean(own, BEFORE)} before the "
        f"projection, on average over tasks, and after it {_mean(own, ORIGINAL)} in the original "
        f"model, {_mean(own, PROJ)} after {PROJ} and {_mean(own, E2E)} after {E2E}.{equal}",
        figures=[
            parts.write_figure(
                folder, "richness", figure, "Macro-F1 of probes by task and variant",
                chart=[
                    dataclasses.replace(panel, title=f"{probe} probe, {panel.title}")
                    for probe, of_probe in by_probe.items() for panel in _panels(of_probe)
                ],
            )
        ],
        table=_pivot(rows, {"probe": "probe", "variant": "features"}),
        note="Features are means over the patches of a picture. The paper's probes differ in "
        "depth and width before and after the projection; the matched probe has the same on both "
        "sides, and as many inputs; the linear one has no hidden layer. The unseen one is linear "
        "too, but trained on pictures that fine-tuning did not see, by cross-validation over the "
        "test pictures, so that features which fit only the training pictures do not count. In "
        "square brackets 95 % intervals, in round ones the change "
        f"against Original. {cells.MARKS} Tables 2 and 3 of the paper.",
        data=[_rows_csv(folder, "richness", ("probe", "task"), rows)],
    )  # fmt: skip


def _panels(rows: Sequence[cells.Row]) -> charts.Chart:
    """Return the macro-F1 of each variant with its interval, one panel per task."""
    hue = cells.colours(rows)
    chart: list[charts.Panel] = []
    for task, by_variant in cells.group(rows, "task", "variant").items():
        values: dict[str, dict[str, Any]] = {}
        for name, row in by_variant.items():
            f1 = row["f1"]
            ends = {"low": f1["low"], "high": f1["high"]}
            text = f"{task}, {name}: {f1['mean']:.3f} {_interval(f1)}"
            values[name] = {"value": f1["mean"], "text": text, **ends}
        chart.append(charts.intervals(task, values, hue, "macro-F1"))
    return chart


def depth(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on probes by layer of the language model; None if not measured."""
    rows = results.get("depth")
    if not rows:
        return None
    curves: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["layer"]):
        by_variant = curves.setdefault(row["tokens"], {}).setdefault(row["task"], {})
        curve = by_variant.setdefault(row["variant"], {"mean": [], "low": [], "high": []})
        for key, values in curve.items():
            values.append(row[key])
    levels = {
        row["task"]: row["f1"]["mean"]
        for row in results["richness"]
        if (row["probe"], row["variant"]) == ("linear", BEFORE)
    }
    names = {"image": "image tokens", "last": "last token"}
    figure = plots.depth(
        {names.get(kind, kind): by_task for kind, by_task in curves.items()},
        cells.colours(rows), levels, "macro-F1",
    )  # fmt: skip
    columns = ("task", "variant", "tokens", "layer", "mean", "low", "high")
    return page.Section(
        title="Probes by layer of the language model",
        reading=" ".join(_rise(names.get(kind, kind), curves[kind]) for kind in curves),
        figures=[
            parts.write_figure(
                folder,
                "depth",
                figure,
                "Macro-F1 of a linear probe by layer",
                chart=[
                    charts.curves(
                        f"{task}, {names.get(kind, kind)}",
                        by_variant,
                        cells.colours(rows),
                        "layer",
                        "macro-F1",
                    )
                    for kind, by_task in curves.items()
                    for task, by_variant in by_task.items()
                ],
            )
        ],
        note="A linear probe on the output of each layer; bands are 95 % intervals. Dashed line: "
        "the same probe on the features before the projection. The layers are those of one "
        f"fine-tuning, with seed {results['seeds'][0]}.",
        data=[
            parts.write_csv(folder, "depth", columns, [[row[c] for c in columns] for row in rows])
        ],
    )


def _rise(kind: str, by_task: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the sentence on the scores by layer of a kind of token, mean over tasks."""
    sentences = []
    for variant in (ORIGINAL, PROJ, E2E):
        means = [task[variant]["mean"] for task in by_task.values() if variant in task]
        if means:
            curve = np.mean(means, axis=0)
            sentences.append(
                f"{variant} {curve[0]:.2f} at layer 0, {curve.max():.2f} at layer "
                f"{curve.argmax()}, {curve[-1]:.2f} at the last"
            )
    return f"At the {kind}: {'; '.join(sentences)}."


def factors(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on changes of one setting at a time; None if not measured."""
    rows = results.get("factors")
    if not rows:
        return None
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    by_task = cells.group(rows, "task", "recipe")
    panels = {
        "model": {
            task: {recipe: row["f1"] for recipe, row in by_recipe.items()}
            for task, by_recipe in by_task.items()
        },
        "probe after it": {
            task: {recipe: row["probe"] for recipe, row in by_recipe.items() if row["probe"]}
            for task, by_recipe in by_task.items()
        },
    }
    hue = dict.fromkeys(recipes, style.PALETTE[0]) | {recipes[0]: style.GREY}
    figure = plots.forest(
        {group: by_name for group, by_name in panels.items() if any(by_name.values())},
        hue, "macro-F1", against=recipes[0],
    )  # fmt: skip
    largest = max(
        recipes[1:] or recipes,
        key=lambda recipe: abs(_mean_change(rows, recipe)),
    )
    return page.Section(
        title="Effects of the recipe",
        reading=f"Against {recipes[0]}, the largest change of the model's F1 is that of {largest}: "
        f"{page.signed(_mean_change(rows, largest))} on average over tasks.",
        figures=[parts.write_figure(folder, "factors", figure, "Macro-F1 by recipe and task")],
        table=_pivot(rows, {"recipe": "recipe", "setting": "setting"}),
        note="One setting of the first recipe is changed at a time. The dashed line is "
        f"the first recipe. {cells.MARKS}",
        data=[
            parts.write_csv(
                folder, "factors",
                ("task", "recipe", "factor", "setting", *cells.VALUE,
                 *(f"change_{c}" for c in cells.CHANGE), *(f"probe_{c}" for c in cells.VALUE)),
                [
                    (row["task"], row["recipe"], row["factor"], row["setting"],
                     *cells.pick(row["f1"], cells.VALUE), *cells.pick(row["change"], cells.CHANGE),
                     *cells.pick(row["probe"], cells.VALUE))
                    for row in rows
                ],
            )
        ],
    )  # fmt: skip


def _mean_change(rows: Sequence[cells.Row], recipe: str) -> float:
    changes = [row["change"]["value"] for row in rows
               if row["recipe"] == recipe and row["change"]]  # fmt: skip
    return float(np.mean(changes)) if changes else 0.0


def _above(row: cells.Row) -> bool:
    return bool(row["change"]) and row["change"]["low"] > 0


def _mean(rows: Iterable[cells.Row], variant: str) -> str:
    """Return the mean F1 of a variant over tasks."""
    values = [row["f1"]["mean"] for row in rows if row["variant"] == variant]
    return f"{np.mean(values):.2f}" if values else page.DASH


def _interval(value: cells.Row) -> str:
    return f"{value['low']:.3f} to {value['high']:.3f}"


def _pivot(rows: Sequence[cells.Row], named: Mapping[str, str]) -> page.Table:
    """Return F1 and its relative change: one row per pair of keys, one column per task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    texts: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        first = tuple(row[key] or page.DASH for key in named)
        text = f"{cells.value(row['f1'])} {cells.interval(row['f1'])}"
        text += cells.relative(row["change"])
        texts.setdefault(first, {})[row["task"]] = text
    lines = [
        (*first, *(by_task.get(task, page.DASH) for task in tasks))
        for first, by_task in texts.items()
    ]
    return page.Table((*named.values(), *tasks), lines)


def _rows_csv(
    folder: pathlib.Path, name: str, first: Sequence[str], rows: Sequence[cells.Row]
) -> tuple[str, str]:
    """Write rows of `projection.table`, with further columns before theirs."""
    columns = (
        *first, "variant", "runs", "images", *(f"f1_{c}" for c in cells.VALUE),
        *(f"accuracy_{c}" for c in cells.VALUE), *(f"change_{c}" for c in cells.CHANGE),
    )  # fmt: skip
    return parts.write_csv(
        folder, name, columns,
        [
            (*(row[c] for c in first), row["variant"], row["runs"], row["images"],
             *cells.pick(row["f1"], cells.VALUE), *cells.pick(row["accuracy"], cells.VALUE),
             *cells.pick(row["change"], cells.CHANGE))
            for row in rows
        ],
    )  # fmt: skip
