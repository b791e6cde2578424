"""Sections of the report on accuracy and on its change by ablation."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.domain_neurons.report import answers, effects, panels, plots
from experiments.domain_neurons.report.effects import CONTROLS
from experiments.modules import widest
from mllm_jax.analysis import power
from mllm_jax.report import figures, page, parts
from mllm_jax.report.report import Results
from mllm_jax.typing import Bool, Float


def accuracy(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the accuracy of the unedited model; None if not measured."""
    baseline = results["baseline"]
    if not baseline:
        return None
    columns = ["accuracy", "low", "high", "chance", "n", "metric"]
    rows = [[domain, *(score[c] for c in columns)] for domain, score in baseline.items()]
    with_chance = {d: score for d, score in baseline.items() if score["chance"] is not None}
    above = sum(score["low"] > score["chance"] for score in with_chance.values())
    beats = f"beats chance in {above} of {len(with_chance)} domains; it " if with_chance else ""
    metrics = dict.fromkeys(score["metric"] for score in baseline.values())

    def format_score(domain: str) -> str:
        score = baseline[domain]
        chance = f", chance {parts.percent(score['chance'])}" if domain in with_chance else ""
        return f"{domain} ({parts.percent(score['accuracy'])}{chance})"

    best, worst = (pick(baseline, key=lambda d: baseline[d]["accuracy"]) for pick in (max, min))
    return page.Section(
        title="Accuracy of the unedited model",
        reading=f"Unedited, the model {beats}is best in {format_score(best)} and worst in "
        f"{format_score(worst)}.",
        figures=[
            parts.write_figure(
                folder, "accuracy", figures.accuracy(baseline),
                "Accuracy of each domain, its interval, and chance",
                chart=panels.accuracy(baseline),
            )
        ],
        note=f"Measured: {parts.join_words(list(metrics))}. Bars are 95 % bootstrap intervals over "
        "questions. Chance is the expected accuracy of a guess among the options; a domain beats "
        "it if its interval lies above.",
        data=[parts.write_csv(folder, "accuracy", ["domain", *columns], rows)],
    )  # fmt: skip


ABLATED = {"selected": "all selected ones", "tested": "those beyond chance"}


class Changes(NamedTuple):
    """The changes of accuracy by the ablation of one module, [mask, data].

    Attributes:
      selected: float[D_, D_], with the neurons of a domain ablated; NaN where not measured.
      star: bool[D_, D_], whether `selected` is beyond chance.
      controls: float[D_, D_] by kind of control, the mean over draws.
    """

    selected: Float[np.ndarray, "domains domains"]
    star: Bool[np.ndarray, "domains domains"]
    controls: dict[str, Float[np.ndarray, "domains domains"]]


def changes(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the changes of accuracy by ablation; None if not measured."""
    runs = results["ablation"]
    if not runs:
        return None
    modules = list(dict.fromkeys(run["module"] for run in runs))
    draws = {kind: count for kind in CONTROLS if (count := effects.count_draws(runs, kind))}
    by_module = {
        module: Changes(
            *change_matrix(results, module),
            {kind: change_matrix(results, module, control=kind)[0] for kind in draws},
        )
        for module in modules
    }
    bound = colour_bound(results)
    figure = plots.ablation_matrix(
        {parts.title(module): change.selected for module, change in by_module.items()},
        {
            CONTROLS[kind] + (f"\n(mean of {count} draws)" if count > 1 else ""): {
                parts.title(module): change.controls[kind] for module, change in by_module.items()
            }
            for kind, count in draws.items()
        },
        {parts.title(module): change.star for module, change in by_module.items()},
        results["domains"],
        bound,
        {domain: score["n"] for domain, score in results["baseline"].items()},
    )
    columns = (
        "module", "own domain, points", "other domains", *(f"{CONTROLS[k]}, own" for k in draws),
        "own beyond chance", "others beyond chance",
    )  # fmt: skip
    rows = [_changes_row(results, module, change) for module, change in by_module.items()]
    return page.Section(
        title="Ablation of the neurons",
        reading=_read_changes(results, by_module),
        figures=[
            parts.write_figure(
                folder,
                "ablation",
                figure,
                "Accuracy change by mask, data and module",
                "Click on a cell of the chart to see the answers that changed.",
                chart=panels.ablation(results, bound),
            )
        ],
        table=page.Table(columns, rows),
        note=f"Rows: the domain whose neurons ({ABLATED[results['ablated']]}) are set to zero, at "
        "every token and every step. Columns: the domain tested, on n questions. The colour scale "
        "extends at least to the smallest detectable change. Controls match in number, layer and "
        "module, rate-matched ones "
        "also in how often and how strongly they are active. Beyond chance: p below "
        f"{power.LEVEL} by flipping signs of paired differences, corrected (Holm) for the cells of "
        "domains with their own neurons ablated, and for all other cells. "
        f"{_read_power(results)} The intervals in the table "
        "files are 95 % paired bootstrap intervals over questions, without that correction: an "
        "interval may exclude zero although the corrected p does not fall below the level.",
        widgets=answers.changed(results),
        data=[_ablation_csv(folder, runs), answers.write(folder, results)],
    )


def colour_bound(results: Results) -> float:
    """Return the change of accuracy at the ends of the colour scale.

    The scale extends at least to the smallest detectable change: with few questions, what may
    be due to chance does not get the deepest colour.
    """
    largest = max((abs(run["difference"]) for run in results["ablation"]), default=0.0)
    possible = [row["possible"] for row in results["power"]]
    findable = 1.0 if None in possible else max(possible, default=0.0)
    return max(0.05, largest, min(findable, 1.0))


def _own_domain(results: Results) -> Bool[np.ndarray, "domains domains"]:
    """Return the cells of `Changes` in which a domain is tested with its own neurons ablated."""
    return np.eye(len(results["domains"]), dtype=bool)


def _read_power(results: Results) -> str:
    """Return the sentence on the smallest changes that the tests of the cells could detect."""
    clauses = []
    for name in ("own", "other"):
        rows = [row for row in results["power"] if row["family"] == name]
        if not rows:
            continue
        possible, likely = effects.family(results, name)
        size = (
            f"{rows[0]['tests']} tests with {name} neurons, {min(r['n'] for r in rows)} questions"
        )
        clauses.append(
            f"{size}: no change can be found"
            if possible is None or likely is None
            else f"{size}: {100 * possible:.1f} points at the least, {100 * likely:.1f} in four of "
            "five studies"
        )
    if not clauses:
        return ""
    return (
        "The smallest changes that these could find, if all answers change to one side "
        f"({'; '.join(clauses)})."
    )


def _read_changes(results: Results, by_module: Mapping[str, Changes]) -> str:
    """Return the sentences on the changes by the ablation of the widest module."""
    module, own = widest(list(by_module)), _own_domain(results)
    change = by_module[module]
    measured = int((~np.isnan(change.selected[own])).sum())
    controls = ", ".join(
        f"{CONTROLS[kind]}: {parts.points(matrix[own])}" for kind, matrix in change.controls.items()
    )
    possible, _ = effects.family(results, "own")
    against = [
        f" Other than that of {CONTROLS[kind]}: {effects.beyond(rows)}."
        for kind in change.controls
        if (rows := effects.select(results, module, kind, "accuracy"))
    ]
    return (
        f"With its own neurons ablated in {parts.title(module).lower()}, accuracy on a domain "
        f"changes by {parts.points(change.selected[own])} points on average"
        f"{f' ({controls})' if controls else ''}, on other domains by "
        f"{parts.points(change.selected[~own])}. Domains with a change beyond chance: "
        f"{effects.found(int(change.star[own].sum()), measured, possible)}.{''.join(against)}"
    )


def _changes_row(results: Results, module: str, change: Changes) -> list[str]:
    own = _own_domain(results)
    return [
        parts.title(module),
        *(parts.points(change.selected[cells]) for cells in (own, ~own)),
        *(parts.points(matrix[own]) for matrix in change.controls.values()),
        *(
            effects.found(
                int(change.star[cells].sum()),
                int((~np.isnan(change.selected[cells])).sum()),
                effects.family(results, family)[0],
            )
            for family, cells in (("own", own), ("other", ~own))
        ),
    ]


def _ablation_csv(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    columns = [
        "module", "mask", "data", "neurons", "control", "draw", "accuracy", "difference", "low",
        "high", "p", "p_holm", "family",
    ]  # fmt: skip
    rows = [[run.get(c) for c in columns] for run in runs]
    return parts.write_csv(folder, "ablation", columns, rows)


def change_matrix(
    results: Results, module: str, *, control: str | None = None
) -> tuple[Float[np.ndarray, "domains domains"], Bool[np.ndarray, "domains domains"]]:
    """Return the accuracy differences of a module by mask and data, and which are beyond chance.

    Args:
      results: The content of results.json.
      module: The module that is ablated.
      control: The kind of control that is ablated, means over draws; None for domain neurons.
    """
    index = {domain: i for i, domain in enumerate(results["domains"])}
    shape = (len(index), len(index))
    total, count, star = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for run in results["ablation"]:
        if run["module"] == module and run["control"] == control:
            cell = index[run["mask"]], index[run["data"]]
            total[cell] += run["difference"]
            count[cell] += 1
            star[cell] = parts.beyond(run)
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0), star


def widest_module(results: Results) -> str | None:
    """Return the ablated module with the most neurons: all, else the last; None if none."""
    modules = [run["module"] for run in results["ablation"]]
    return widest(modules) if modules else None
