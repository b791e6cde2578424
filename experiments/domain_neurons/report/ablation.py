"""Sections of the report on accuracy, on ablation and on the deviation of hidden states."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.domain_neurons.report import plots
from experiments.domain_neurons.report.layers import token_kinds
from mllm_jax.report import figures, page, parts
from mllm_jax.report.report import Results
from mllm_jax.typing import Bool, Float

LEVEL = 0.05  # of tests, after their correction
MEASURES = {"relative_l2": "relative L2", "cosine": f"1 {page.MINUS} cosine"}
Deviations = dict[str, dict[str, dict[str, dict[str, float]]]]  # by module, kind, domain, measure


def accuracy(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the accuracy of the unedited model; None where not measured."""
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
            parts.write_png(
                folder, "accuracy", figures.accuracy(baseline),
                "Accuracy of each domain, its interval, and chance",
            )
        ],
        note=f"Measured: {parts.join_words(list(metrics))}. Bars are 95 % bootstrap intervals over "
        "questions. Chance is the expected accuracy of a guess among the options; a domain beats "
        "it if its interval lies above.",
        data=[parts.write_csv(folder, "accuracy", ["domain", *columns], rows)],
    )  # fmt: skip


class Changes(NamedTuple):
    """The changes of accuracy by the ablation of one module, [mask, data].

    Attributes:
        selected: float[D_, D_], with the neurons of a domain ablated; NaN where not measured.
        star: bool[D_, D_], where `selected` is beyond chance.
        control: float[D_, D_], with random neurons ablated, the mean over draws.
    """

    selected: Float[np.ndarray, "domains domains"]
    star: Bool[np.ndarray, "domains domains"]
    control: Float[np.ndarray, "domains domains"]


def changes(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the changes of accuracy by ablation; None where not measured."""
    runs = results["ablation"]
    if not runs:
        return None
    modules = list(dict.fromkeys(run["module"] for run in runs))
    by_module = {
        module: Changes(
            *change_matrix(results, module, control=False),
            change_matrix(results, module, control=True)[0],
        )
        for module in modules
    }
    draws = len({run["control"] for run in runs} - {None})
    figure = plots.ablation_matrix(
        {parts.title(module): change.selected for module, change in by_module.items()},
        {parts.title(module): change.control for module, change in by_module.items() if draws},
        {parts.title(module): change.star for module, change in by_module.items()},
        results["domains"],
        "random neurons ablated" + (f"\n(mean of {draws} draws)" if draws > 1 else ""),
    )
    columns = (
        "module", "own domain, points", "other domains", "random, own", "random, others",
        "own beyond chance", "others beyond chance",
    )  # fmt: skip
    return page.Section(
        title="Ablation of the neurons",
        reading=_read_changes(results, by_module, controlled=bool(draws)),
        figures=[
            parts.write_png(folder, "ablation", figure, "Accuracy change by mask, data and module")
        ],
        table=page.Table(columns, [_changes_row(m, change) for m, change in by_module.items()]),
        note="Rows: the domain whose neurons are set to zero, at every token and every step. "
        "Columns: the domain tested. Random neurons match in number, layer and module. Beyond "
        f"chance: p below {LEVEL} by flipping signs of paired differences, corrected for the "
        "number of cells (Holm). The intervals in the table files are 95 % paired bootstrap "
        "intervals over questions, without that correction: an interval may exclude zero although "
        "the corrected p does not fall below the level.",
        data=[_ablation_csv(folder, runs), *_against_random_csv(folder, results)],
    )


def _own_domain(results: Results) -> Bool[np.ndarray, "domains domains"]:
    """Return the cells of `Changes` in which a domain is tested with its own neurons ablated."""
    return np.eye(len(results["domains"]), dtype=bool)


def _read_changes(results: Results, by_module: Mapping[str, Changes], *, controlled: bool) -> str:
    """Return the sentence on the changes by the ablation of the widest module."""
    module, own = _widest(list(by_module)), _own_domain(results)
    change = by_module[module]
    measured = (~np.isnan(change.selected[own])).sum()
    random = f" (as many random neurons: {parts.points(change.control[own])})" if controlled else ""
    rows = [row for row in results["against_random"] if row["module"] == module]
    beyond = sum(row["p_holm"] <= LEVEL for row in rows)
    unlike_random = (
        f", and other than that of random neurons in {beyond} of {len(rows)}" if rows else ""
    )
    return (
        f"With its own neurons ablated in {parts.title(module).lower()}, accuracy on a domain "
        f"changes by {parts.points(change.selected[own])} points on average{random}, on other "
        f"domains by {parts.points(change.selected[~own])}; the change is beyond chance in "
        f"{change.star[own].sum()} of {measured} domains{unlike_random}."
    )


def _changes_row(module: str, change: Changes) -> list[str]:
    own = np.eye(len(change.selected), dtype=bool)
    return [
        parts.title(module),
        *(parts.points(change.selected[cells]) for cells in (own, ~own)),
        *(parts.points(change.control[cells]) for cells in (own, ~own)),
        *(
            f"{change.star[cells].sum()} of {(~np.isnan(change.selected[cells])).sum()}"
            for cells in (own, ~own)
        ),
    ]


def _ablation_csv(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    columns = [
        "module", "mask", "data", "neurons", "control", "accuracy", "difference", "low", "high",
        "p", "p_holm",
    ]  # fmt: skip
    rows = [[run.get(c) for c in columns] for run in runs]
    return parts.write_csv(folder, "ablation", columns, rows)


def _against_random_csv(folder: pathlib.Path, results: Results) -> list[tuple[str, str]]:
    rows = results["against_random"]
    columns = ["module", "data", "difference", "low", "high", "p", "p_holm"]
    cells = [[row[c] for c in columns] for row in rows]
    return [parts.write_csv(folder, "against_random", columns, cells)] if rows else []


def deviation(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on how far ablation moves the hidden states; None where not measured."""
    runs = [run for run in results["ablation"] if run["deviation"]]
    on_own_data = [run for run in runs if run["mask"] == run["data"]]
    if not any(run["control"] is None for run in on_own_data):
        return None
    selected, control = (
        _mean_deviations(run for run in on_own_data if (run["control"] is None) != controls)
        for controls in (False, True)
    )

    def mean(of: Deviations, module: str, kind: str, measure: str) -> str:
        values = [moved[measure] for moved in of.get(module, {}).get(kind, {}).values()]
        return parts.two_digits(float(np.mean(values))) if values else page.DASH

    rows = [
        [module, kind, *(mean(of, module, kind, m) for m in MEASURES for of in (selected, control))]
        for module, by_kind in selected.items()
        for kind in by_kind
    ]
    module = parts.title(_widest([run["module"] for run in results["ablation"]]))
    kind = token_kinds(selected)[0]
    moved, by_chance = (mean(of, module, kind, "relative_l2") for of in (selected, control))
    heads = [head for label in MEASURES.values() for head in (label, "random")]
    return page.Section(
        title="Deviation of the hidden states",
        reading=f"The ablation of a domain's own neurons ({module.lower()}) moves the hidden "
        f"states of {kind} tokens by {moved} of their norm; random neurons, by {by_chance}.",
        figures=[
            parts.write_png(
                folder, "deviation", plots.deviation(selected, control, MEASURES),
                "Hidden-state deviation by module and token kind",
            )
        ],
        table=page.Table(["module", "tokens", *heads], rows),
        note="Each domain tested on its own data; means over tokens and, for random neurons, over "
        "draws. The scale is logarithmic.",
        data=[_deviation_csv(folder, runs)],
    )  # fmt: skip


def _deviation_csv(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    columns = ["module", "mask", "data", "control"]
    rows = [
        [*(run[c] for c in columns), kind, *(moved[measure] for measure in MEASURES)]
        for run in runs
        for kind, moved in run["deviation"].items()
    ]
    return parts.write_csv(folder, "deviation", [*columns, "kind", *MEASURES], rows)


def _mean_deviations(runs: Iterable[Mapping[str, Any]]) -> Deviations:
    """Return the mean deviations over runs, by title of module, kind, domain and measure."""
    gathered: dict[tuple[str, str, str, str], list[float]] = {}
    for run in runs:
        for kind, moved in run["deviation"].items():
            for measure, value in moved.items():
                gathered.setdefault((run["module"], kind, run["data"], measure), []).append(value)
    means: Deviations = {}
    for (module, kind, domain, measure), values in gathered.items():
        by_domain = means.setdefault(parts.title(module), {}).setdefault(kind, {})
        by_domain.setdefault(domain, {})[measure] = float(np.mean(values))
    return means


def change_matrix(
    results: Results, module: str, *, control: bool
) -> tuple[Float[np.ndarray, "domains domains"], Bool[np.ndarray, "domains domains"]]:
    """Return the accuracy differences of a module by mask and data, and which are beyond chance.

    Args:
        results: the content of results.json.
        module: the module that is ablated.
        control: whether random neurons are ablated; the differences are means over draws.
    """
    index = {domain: i for i, domain in enumerate(results["domains"])}
    shape = (len(index), len(index))
    total, count, star = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for run in results["ablation"]:
        if run["module"] == module and (run["control"] is not None) == control:
            cell = index[run["mask"]], index[run["data"]]
            total[cell] += run["difference"]
            count[cell] += 1
            star[cell] = not control and run["p_holm"] <= LEVEL
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0), star


def widest_module(results: Results) -> str | None:
    """Return the ablated module of most neurons: all together, or the last; None for none."""
    modules = [run["module"] for run in results["ablation"]]
    return _widest(modules) if modules else None


def _widest(modules: Sequence[str]) -> str:
    return "all" if "all" in modules else modules[-1]
