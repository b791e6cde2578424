"""Sections of the report on how far ablation moves the hidden states of the language model."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.domain_neurons.report import effects, panels, plots
from experiments.domain_neurons.report.effects import CONTROLS
from experiments.domain_neurons.report.layers import token_kinds
from experiments.modules import widest
from mllm_jax.report import page, parts, style
from mllm_jax.report.report import Results

MEASURES = {"relative_l2": "relative L2", "cosine": f"1 {page.MINUS} cosine"}
Deviations = dict[str, dict[str, dict[str, dict[str, float]]]]  # by module, kind, domain, measure
OWN = "own neurons"
Row = Mapping[str, Any]


def last_layer(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on how far ablation moves the hidden states; None if not measured."""
    runs = [run for run in results["ablation"] if run["deviation"]]
    on_own_data = [run for run in runs if run["mask"] == run["data"]]
    if not any(run["control"] is None for run in on_own_data):
        return None
    selected = _mean_deviations(run for run in on_own_data if run["control"] is None)
    controls = {
        kind: _mean_deviations(run for run in on_own_data if run["control"] == kind)
        for kind in CONTROLS
        if effects.count_draws(on_own_data, kind)
    }
    module = parts.title(widest([run["module"] for run in results["ablation"]]))
    kind = token_kinds(selected)[0]
    others = [
        f"; {CONTROLS[name]}, by {_mean(_by_domain(of, module, kind, 'relative_l2'))}"
        for name, of in controls.items()
    ]
    shown = next(iter(controls), None)
    return page.Section(
        title="Deviation of the hidden states",
        reading=f"The ablation of a domain's own neurons ({module.lower()}) moves the hidden "
        f"states of {kind} tokens after the last layer of the language "
        f"model by {_mean(_by_domain(selected, module, kind, 'relative_l2'))} of their norm"
        f"{''.join(others)}.",
        figures=[
            parts.write_figure(
                folder, "deviation",
                plots.deviation(
                    selected, controls[shown] if shown else {}, MEASURES,
                    CONTROLS[shown] if shown else "",
                ),
                "Hidden-state deviation by module and token kind",
                chart=panels.deviation(
                    selected, {CONTROLS[name]: of for name, of in controls.items()},
                    "relative_l2", MEASURES["relative_l2"],
                ),
            )
        ],
        table=_table(selected, controls),
        note="Each domain tested on its own data; means over tokens and, for controls, over draws; "
        "in brackets the lowest and the highest domain. The scale is logarithmic. The table file "
        "has 95 % bootstrap intervals over questions.",
        data=[_deviation_csv(folder, runs)],
    )  # fmt: skip


def _by_domain(of: Deviations, module: str, kind: str, measure: str) -> list[float]:
    return [moved[measure] for moved in of.get(module, {}).get(kind, {}).values()]


def _table(selected: Deviations, controls: Mapping[str, Deviations]) -> page.Table:
    """Return the deviations by module and kind of token, of domain neurons and of controls."""
    sources = [selected, *controls.values()]
    rows = [
        [module, kind, *(_spread(_by_domain(of, module, kind, measure))
                         for measure in MEASURES for of in sources)]
        for module, by_kind in selected.items()
        for kind in by_kind
    ]  # fmt: skip
    of_controls = [CONTROLS[name] for name in controls]
    heads = [head for label in MEASURES.values() for head in (label, *of_controls)]
    return page.Table(["module", "tokens", *heads], rows)


def _mean(values: Sequence[float]) -> str:
    return parts.two_digits(float(np.mean(values))) if values else page.DASH


def _spread(values: Sequence[float]) -> str:
    """Return a mean, and the lowest and the highest value in brackets; a dash for no values."""
    ends = [parts.two_digits(end) for end in (min(values), max(values))] if values else []
    return f"{_mean(values)} ({page.DASH.join(ends)})" if ends else page.DASH


def _deviation_csv(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    columns = ["module", "mask", "data", "control", "draw"]
    values = [f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")]
    rows = [
        [*(run[c] for c in columns), kind, *(moved[value] for value in values)]
        for run in runs
        for kind, moved in run["deviation"].items()
    ]
    return parts.write_csv(folder, "deviation", [*columns, "kind", *values], rows)


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


def by_layer(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the deviation after each layer; None if there is none."""
    rows, layers = results["deviation_by_layer"], results["deviation_layers"]
    if not rows:
        return None
    module = widest([row["module"] for row in rows])
    tokens = next(row["tokens"] for row in rows)
    shown = [
        row for row in rows
        if (row["module"], row["tokens"], row["measure"]) == (module, tokens, "relative_l2")
    ]  # fmt: skip
    hue = style.palette([OWN, *CONTROLS.values()])
    curves = {
        domain: {
            CONTROLS.get(row["control"], OWN): _curve(row, layers)
            for row in shown
            if row["data"] == domain
        }
        for domain in dict.fromkeys(row["data"] for row in shown)
    }
    named, label = parts.title(module).lower(), f"relative L2 of {tokens} tokens"
    against = [row for row in shown if row["control"] == "rate" and row["difference_low"]]
    return page.Section(
        title="Deviation by layer",
        reading=f"Neurons are ablated in {named}. {_read_layers(against, layers)}",
        figures=[
            parts.write_figure(
                folder, "deviation_by_layer",
                plots.curves_by_domain(curves, hue, label),
                "Hidden-state deviation by layer and domain, own neurons and controls",
                chart=panels.curves_by_domain(curves, hue, label),
            )
        ],
        table=page.Table(
            ["domain", "layers", "own moves farther", "own moves less far", "undecided"],
            [[row["data"], str(len(layers)), *map(str, _count(row))] for row in against],
        ) if against else None,
        note="The deviation of the states after each layer of the language model from those "
        "without ablation, the mean over tokens; of controls also over draws. The table counts the "
        "layers at which the 95 % t interval of own less rate-matched, over pictures and draws, "
        "lies above, below or about zero, layer by layer without correction. The table file has "
        "both measures, all modules and kinds of token, and every interval.",
        data=[_by_layer_csv(folder, rows, layers)],
    )  # fmt: skip


def _curve(row: Row, layers: Sequence[int]) -> dict[str, Any]:
    ends = {} if row["control"] else {"low": row["low"], "high": row["high"]}
    return {"at": layers, "mean": row["value"], **ends}


def _count(row: Row) -> tuple[int, int, int]:
    """Return at how many layers own neurons move states farther, less far, or neither."""
    above = sum(low > 0 for low in row["difference_low"])
    below = sum(high < 0 for high in row["difference_high"])
    return above, below, len(row["value"]) - above - below


def _read_layers(against: Sequence[Row], layers: Sequence[int]) -> str:
    """Return the sentences on where own neurons differ from rate-matched ones."""
    if not against:
        return "Own less rate-matched neurons has no interval: that needs several draws."
    counts = [_count(row) for row in against]
    largest = [int(np.argmax(row["difference"])) for row in against]
    places = ", ".join(
        f"{row['data']} {format(row['difference'][at], '+.3f').replace('-', page.MINUS)} at layer "
        f"{layers[at]}"
        for row, at in zip(against, largest, strict=True)
    )
    every = sum(above == len(layers) for above, _, _ in counts)
    return (
        f"In {every} of {len(counts)} domains the interval of own less rate-matched lies above "
        f"zero after every one of {len(layers)} layers, in {sum(not c[0] for c in counts)} after "
        f"none. Own less rate-matched is largest in {places}."
    )


def _by_layer_csv(
    folder: pathlib.Path, rows: Sequence[Row], layers: Sequence[int]
) -> tuple[str, str]:
    named = ["module", "data", "control", "measure", "tokens"]
    values = ["value", "low", "high", "difference", "difference_low", "difference_high"]
    lines = [
        [*(row[c] for c in named), layer, *(row[v][i] if row.get(v) else None for v in values)]
        for row in rows
        for i, layer in enumerate(layers)
    ]
    return parts.write_csv(folder, "deviation_by_layer", [*named, "layer", *values], lines)
