"""Interactive charts of the domain-neuron study, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.report import charts, page, parts, style
from mllm_jax.report.report import Results

Matrices = Mapping[str, np.ndarray]


def accuracy(baseline: Mapping[str, Mapping[str, Any]]) -> charts.Chart:
    """Return the accuracy of each domain with its interval."""
    values: dict[str, dict[str, Any]] = {}
    for domain, of in baseline.items():
        chance = "" if of["chance"] is None else f", chance {of['chance']:.1%}"
        text = (
            f"{domain}: {of['accuracy']:.1%} [{of['low']:.1%}, {of['high']:.1%}], n = {of['n']:,}"
        )
        ends = {"low": of["low"], "high": of["high"]}
        values[domain] = {"value": of["accuracy"], **ends, "text": text + chance}
    title = "Accuracy, 95 % interval"
    return [charts.intervals(title, values, style.palette(list(baseline)), "accuracy")]


def neurons(selection: Mapping[str, Any], domains: Sequence[str]) -> charts.Chart:
    """Return the number of selected neurons by layer, one panel per module."""
    hue = style.palette(domains)
    return [
        charts.bars(parts.title(module), of["per_layer"], hue, "layer", "neurons")
        for module, of in selection.items()
    ]


def shared(jaccard: Matrices, names: Sequence[str]) -> charts.Chart:
    """Return the Jaccard indices of pairs, one panel per title."""
    pairs = np.tri(len(names), k=-1, dtype=bool)
    below = {
        title: np.where(pairs, np.asarray(of), np.nan)[1:, :-1] for title, of in jaccard.items()
    }
    bound = max(0.05, float(np.nanmax(np.stack(list(below.values())), initial=0)))

    def cells(values: np.ndarray, form: str) -> list[list[str]]:
        return [
            ["" if np.isnan(value) else form.format(value, names[row + 1], names[column])
             for column, value in enumerate(line)]
            for row, line in enumerate(values)
        ]  # fmt: skip

    return [
        charts.matrix(
            title, values, names[1:], names[:-1], bounds=(0, bound), colours="counts",
            texts=cells(values, "{:.2f}"), hovers=cells(values, "{1} and {2}: Jaccard {0:.3f}"),
        )
        for title, values in below.items()
    ]  # fmt: skip


def halves(tests: Mapping[str, Mapping[str, Any]], domains: Sequence[str]) -> charts.Chart:
    """Return the share of common neurons of two halves by their size."""
    hue = style.palette(domains)
    return [
        charts.lines(
            parts.title(module), test["examples"],
            dict(zip(domains, np.transpose(test["halves"]).tolist(), strict=True)), hue,
            "examples of a domain in a half", "shared neurons (Jaccard)",
        )
        for module, test in tests.items()
    ]  # fmt: skip


def ablation(results: Results, bound: float) -> charts.Chart:
    """Return the changes of accuracy, one panel per module; a click opens a cell's answers.

    Args:
      results: The content of results.json.
      bound: The change at the ends of the colour scale.
    """
    domains = results["domains"]
    modules = list(dict.fromkeys(run["module"] for run in results["ablation"]))
    chart: list[charts.Panel] = []
    for module in modules:
        values = np.full((len(domains), len(domains)), np.nan)
        texts, hovers, opens = ([[""] * len(domains) for _ in domains] for _ in range(3))
        for run in results["ablation"]:
            if run["module"] != module or run["control"] is not None:
                continue
            row, column = domains.index(run["mask"]), domains.index(run["data"])
            values[row, column] = run["difference"]
            texts[row][column] = points(run["difference"]) + ("*" if parts.beyond(run) else "")
            hovers[row][column] = describe_cell(results, run)
            opens[row][column] = cell_id(module, row, column)
        chart.append(
            charts.matrix(
                f"{parts.title(module)}: change of accuracy, points", values, domains, domains,
                bounds=(-bound, bound), colours="changes", texts=texts, hovers=hovers, opens=opens,
                x="tested on", y="neurons of",
            )
        )  # fmt: skip
    return chart


def describe_cell(results: Results, run: Mapping[str, Any]) -> str:
    """Return a cell in words: its change, interval, number of questions and p."""
    count = results["baseline"].get(run["data"], {}).get("n")
    size = f", n = {count:,}" if count else ""
    return (
        f"{run['neurons']:,} neurons of {run['mask']} ablated, tested on {run['data']}: "
        f"{points(run['difference'])} points [{points(run['low'])}, {points(run['high'])}]"
        f"{size}, p = {run['p']:.2g}, corrected {run['p_holm']:.2g}"
    )


def cell_id(module: str, mask: int, data: int) -> str:
    """Return the id of the element with the answers of a cell."""
    return f"cell-{module}-{mask}-{data}"


def deviation(
    selected: Mapping[str, Any], controls: Mapping[str, Any], measure: str, label: str
) -> charts.Chart:
    """Return the deviation of hidden states, one panel per module.

    Args:
      selected: {module: {kind: {domain: {measure: value}}}}, of a domain's own neurons.
      controls: {name: the same of a control}.
      measure: The measure that is drawn.
      label: The name of the measure.
    """
    sources = {"own neurons": selected} | dict(controls)
    marks = dict(zip(sources, ("circle", "circle-open", "diamond-open", "square-open")))
    chart: list[charts.Panel] = []
    for module, by_kind in selected.items():
        traces: list[charts.Trace] = []
        for name, source in sources.items():
            cells = [
                (f"{kind}, {domain}", of[measure])
                for kind in by_kind
                for domain, of in source.get(module, {}).get(kind, {}).items()
            ]
            traces.append(
                {"type": "scatter", "mode": "markers", "name": charts.label(name),
                 "x": [value for _, value in cells], "y": [charts.label(cell) for cell, _ in cells],
                 "marker": {"symbol": marks[name], "size": 9, "color": style.PALETTE[0]}}
            )  # fmt: skip
        chart.append(
            charts.Panel(module, traces, label, layout={"yaxis": {"autorange": "reversed"}})
        )
    return chart


def lens(curves: Mapping[str, Mapping[str, Any]], kinds: Sequence[str]) -> charts.Chart:
    """Return the entropy of the lens by layer, one panel per kind of token."""
    hue = style.palette(list(curves))
    return [
        charts.curves(
            f"{kind} tokens",
            {domain: of[kind] for domain, of in curves.items() if kind in of},
            hue, "layer", "entropy of the lens, nats",
        )
        for kind in kinds
    ]  # fmt: skip


def curves_by_domain(
    curves: Mapping[str, Mapping[str, Mapping[str, Any]]], hue: Mapping[str, str], label: str
) -> charts.Chart:
    """Return curves by layer, one panel per domain; see `plots.curves_by_domain`."""
    return [
        charts.curves(domain, by_name, hue, "layer", label) for domain, by_name in curves.items()
    ]


def features(by_module: Mapping[str, Mapping[str, Any]]) -> charts.Chart:
    """Return pictures on two principal components, one panel per module."""
    chart: list[charts.Panel] = []
    for module, of in by_module.items():
        values = {
            domain: ([point[0] for point in pictures], [point[1] for point in pictures])
            for domain, pictures in of["points"].items()
        }
        first, second = (f"{100 * share:.0f} % of the variance" for share in of["share"])
        chart.append(
            charts.points(
                parts.title(module), values, style.palette(list(values)),
                f"first component, {first}", f"second, {second}",
            )
        )  # fmt: skip
    return chart


def points(value: float) -> str:
    """Return a difference of accuracy in percentage points as text."""
    change = 100 * value
    text = f"{change:+.0f}" if abs(change) >= 9.95 else f"{change:+.1f}"
    return "0" if float(text) == 0 else text.replace("-", page.MINUS)
