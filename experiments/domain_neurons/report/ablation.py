"""Sections of the report on accuracy, on ablation and on the deviation of hidden states."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from experiments.domain_neurons.report import plots
from experiments.domain_neurons.report.layers import token_kinds
from mllm_jax.report import figures, page, parts

LEVEL = 0.05  # of tests, after their correction


def accuracy(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Build the section on the accuracy of the unedited model; None where not measured."""
    baseline = results["baseline"]
    if not baseline:
        return None
    columns = ["accuracy", "low", "high", "chance", "n", "metric"]
    rows = [[domain, *(score[c] for c in columns)] for domain, score in baseline.items()]
    guessed = {d: score for d, score in baseline.items() if score["chance"] is not None}
    above = sum(score["low"] > score["chance"] for score in guessed.values())
    beats = f"beats chance in {above} of {len(guessed)} domains; it " if guessed else ""
    metrics = dict.fromkeys(score["metric"] for score in baseline.values())

    def extreme(pick: Callable) -> str:
        domain = pick(baseline, key=lambda d: baseline[d]["accuracy"])
        score = baseline[domain]
        chance = f", chance {parts.percent(score['chance'])}" if domain in guessed else ""
        return f"{domain} ({parts.percent(score['accuracy'])}{chance})"

    return page.Section(
        title="The model answers",
        reading=f"Unedited, the model {beats}is best in {extreme(max)} and worst in "
        f"{extreme(min)}.",
        figures=[
            parts.png(
                folder,
                "accuracy",
                figures.accuracy(baseline),
                "Accuracy of each domain, its interval, and chance",
            )
        ],
        note=f"Measured: {parts.listed(list(metrics))}. Bars are 95 % bootstrap intervals over "
        "questions. Chance is what a guess among the options gives; a domain beats it if its "
        "interval lies above.",
        data=[parts.csv(folder, "accuracy", ["domain", *columns], rows)],
    )


def changes(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Build the section on accuracy without the neurons of a domain; None where not measured."""
    runs = results["ablation"]
    if not runs:
        return None
    columns = [
        "module", "mask", "data", "neurons", "control", "accuracy", "difference", "low", "high",
        "p", "p_holm",
    ]  # fmt: skip
    modules = list(dict.fromkeys(run["module"] for run in runs))
    selected = {module: change_matrix(results, module, control=False) for module in modules}
    control = {module: change_matrix(results, module, control=True)[0] for module in modules}
    draws = len({run["control"] for run in runs} - {None})
    figure = plots.ablation_matrix(
        {parts.name(module): change for module, (change, _) in selected.items()},
        {parts.name(module): change for module, change in control.items() if draws},
        {parts.name(module): star for module, (_, star) in selected.items()},
        results["domains"],
        "random neurons off" + (f"\n(mean of {draws} draws)" if draws > 1 else ""),
    )

    own = np.eye(len(results["domains"]), dtype=bool)
    rows = [
        [
            parts.name(module),
            *(parts.points(values) for values in (change[own], change[~own])),
            *(parts.points(values) for values in (control[module][own], control[module][~own])),
            *(f"{star[of].sum()} of {(~np.isnan(change[of])).sum()}" for of in (own, ~own)),
        ]
        for module, (change, star) in selected.items()
    ]
    module = widest(results)
    change, star = selected[module]
    measured = (~np.isnan(change[own])).sum()
    random = f" (as many random neurons: {parts.points(control[module][own])})" if draws else ""
    return page.Section(
        title="Switching them off",
        reading=f"With its own neurons off in {parts.name(module).lower()}, accuracy on a domain "
        f"changes by {parts.points(change[own])} points on average{random}, on other domains by "
        f"{parts.points(change[~own])}; the change is beyond chance in {star[own].sum()} of "
        f"{measured} domains{_beyond_random(results, module)}.",
        figures=[parts.png(folder, "ablation", figure, "Accuracy change by mask, data and module")],
        table=page.Table(
            [
                "module", "own domain, points", "other domains", "random, own", "random, others",
                "own beyond chance", "others beyond chance",
            ],
            rows,
        ),
        note="Rows: the domain whose neurons are set to zero, at every token and every step. "
        "Columns: the domain tested. Random neurons match in number, layer and module. Beyond "
        f"chance: p below {LEVEL} by flipping signs of paired differences, corrected for the "
        "number of cells (Holm). The intervals in the table files are 95 % paired bootstrap "
        "intervals over questions, one by one: one may leave out zero where p, corrected, does "
        "not fall below the level.",
        data=[
            parts.csv(folder, "ablation", columns, [[run.get(c) for c in columns] for run in runs]),
            *_against(folder, results),
        ],
    )  # fmt: skip


def _beyond_random(results: Mapping, module: str) -> str:
    """How often a domain's own neurons matter otherwise than random ones."""
    rows = [row for row in results["against_random"] if row["module"] == module]
    if not rows:
        return ""
    beyond = sum(row["p_holm"] <= LEVEL for row in rows)
    return f", and other than that of random neurons in {beyond} of {len(rows)}"


def _against(folder: pathlib.Path, results: Mapping) -> list[tuple[str, str]]:
    rows = results["against_random"]
    columns = ["module", "data", "difference", "low", "high", "p", "p_holm"]
    cells = [[row[c] for c in columns] for row in rows]
    return [parts.csv(folder, "against_random", columns, cells)] if rows else []


def deviation(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Build the section on how far ablation moves the hidden states; None where not measured."""
    runs = [run for run in results["ablation"] if run["deviation"]]
    own = [run for run in runs if run["mask"] == run["data"] and run["control"] is None]
    random = [run for run in runs if run["mask"] == run["data"] and run["control"] is not None]
    if not own:
        return None
    measures = {"relative_l2": "relative L2", "cosine": f"1 {page.MINUS} cosine"}
    columns = ["module", "mask", "data", "control"]
    all_rows = [
        [*(run[c] for c in columns), kind, *(moved[measure] for measure in measures)]
        for run in runs
        for kind, moved in run["deviation"].items()
    ]
    selected, control = _moved(own), _moved(random)
    figure = plots.deviation(selected, control, measures)

    def mean(source: Mapping, module: str, kind: str, measure: str) -> str:
        values = [m[measure] for m in source.get(module, {}).get(kind, {}).values()]
        return parts.small(np.mean(values)) if values else page.DASH

    rows = [
        [
            module,
            kind,
            *(mean(source, module, kind, m) for m in measures for source in (selected, control)),
        ]
        for module, by_kind in selected.items()
        for kind in by_kind
    ]
    module, kind = parts.name(widest(results)), token_kinds(selected)[0]
    moved, by_chance = (mean(s, module, kind, "relative_l2") for s in (selected, control))
    return page.Section(
        title="How far hidden states move",
        reading=f"Switching off a domain's own neurons ({module.lower()}) moves the hidden states "
        f"of {kind} tokens by {moved} of their norm; random neurons, by {by_chance}.",
        figures=[
            parts.png(
                folder, "deviation", figure, "Hidden-state deviation by module and token kind"
            )
        ],
        table=page.Table(
            ["module", "tokens", "relative L2", "random", f"1 {page.MINUS} cosine", "random"], rows
        ),
        note="Each domain tested on its own data; means over tokens and, for random neurons, over "
        "draws. The scale is logarithmic.",
        data=[parts.csv(folder, "deviation", [*columns, "kind", *measures], all_rows)],
    )


def _moved(runs: Iterable[Mapping]) -> dict:
    """Mean over runs: {module name: {kind: {domain: {measure: float}}}}."""
    gathered: dict[tuple, list[float]] = {}
    for run in runs:
        for kind, moved in run["deviation"].items():
            for measure, value in moved.items():
                gathered.setdefault((run["module"], kind, run["data"], measure), []).append(value)
    means: dict = {}
    for (module, kind, domain, measure), values in gathered.items():
        by_domain = means.setdefault(parts.name(module), {}).setdefault(kind, {})
        by_domain.setdefault(domain, {})[measure] = float(np.mean(values))
    return means


def change_matrix(results: Mapping, module: str, *, control: bool) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy differences (the mean over draws, for controls), and which are beyond chance."""
    place = {domain: i for i, domain in enumerate(results["domains"])}
    shape = (len(place), len(place))
    total, runs, star = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for run in results["ablation"]:
        if run["module"] == module and (run["control"] is not None) == control:
            cell = place[run["mask"]], place[run["data"]]
            total[cell] += run["difference"]
            runs[cell] += 1
            star[cell] = not control and run["p_holm"] <= LEVEL
    return np.divide(total, runs, out=np.full(shape, np.nan), where=runs > 0), star


def widest(results: Mapping) -> str | None:
    """The module whose ablation says most: all of them together, if that was run."""
    modules = [run["module"] for run in results["ablation"]]
    return "all" if "all" in modules else modules[-1] if modules else None
