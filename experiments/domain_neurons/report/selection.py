"""Sections of the report on the selected neurons and their overlap."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.domain_neurons.report import panels, plots
from mllm_jax.report import figures, page, parts
from mllm_jax.report.report import Results

RULES = {
    "entropy": "Selected are the neurons whose probability of being active, normalised over the "
    "domains, has the lowest entropy (DAPE), among those that are often active in some domain.",
    "given": "The neurons come from a file.",
    "other": "Selected are the best neurons of each domain by another selector, as many as the "
    "entropy (DAPE) selects.",
}
MIN_NEURONS = 10  # of two domains together, for them to be called close
_SHAPE, _SELECTED = ["site", "layers", "width"], ["k", "threshold", "bar", "selected", "share"]


def neurons(folder: pathlib.Path, results: Results) -> page.Section:
    """Build the section on the number of selected neurons by module and layer."""
    selection, modules, domains = results["selection"], results["modules"], results["domains"]
    table = [
        [
            parts.title(module),
            f"{modules[module]['layers'] * modules[module]['width']:,}",
            f"{selected['selected']:,}",
            f"{100 * selected['share']:.2f} %",
            *(f"{selected['neurons_per_domain'][domain]:,}" for domain in domains),
        ]
        for module, selected in selection.items()
    ]
    figure = plots.neurons_per_layer(
        {parts.title(module): selected["per_layer"] for module, selected in selection.items()},
        {parts.title(module): _subtitle(shape) for module, shape in modules.items()},
    )
    deepest = max(selection, key=lambda module: modules[module]["layers"])
    totals = {
        domain: sum(selected["neurons_per_domain"][domain] for selected in selection.values())
        for domain in domains
    }
    most, least = (pick(totals, key=lambda domain: totals[domain]) for pick in (max, min))
    return page.Section(
        title="Where the neurons are",
        reading=f"{_read_thirds(selection[deepest], parts.title(deepest).lower())} Most neurons "
        f"belong to {most} ({totals[most]:,}), fewest to {least} ({totals[least]:,}).",
        figures=[
            parts.write_figure(
                folder,
                "neurons",
                figure,
                "Neurons of each domain by module and layer",
                chart=panels.neurons(selection, domains),
            )
        ],
        table=page.Table(["module", "neurons", "selected", "share", *domains], table),
        note=f"{RULES.get(results['selector'], RULES['other'])} A neuron belongs to every domain "
        "in which it passes the threshold, so the domains may add up to more than the selection.",
        data=_neurons_csv(folder, results),
    )


def _subtitle(shape: Mapping[str, Any]) -> str:
    times = "\N{MULTIPLICATION SIGN}"
    return f"{shape['site']} · {shape['layers']} {times} {shape['width']:,}"


def _neurons_csv(folder: pathlib.Path, results: Results) -> list[tuple[str, str]]:
    selection, modules = results["selection"], results["modules"]
    selected_rows = [
        [module, *(modules[module][c] for c in _SHAPE), *(_cell(selected[c]) for c in _SELECTED)]
        for module, selected in selection.items()
    ]
    layer_rows = [
        [module, domain, layer, count]
        for module, selected in selection.items()
        for domain, counts in selected["per_layer"].items()
        for layer, count in enumerate(counts)
    ]
    token_rows = [
        [module, domain, count]
        for module, by_domain in results["tokens"].items()
        for domain, count in by_domain.items()
    ]
    layer_columns = ["module", "domain", "layer", "neurons"]
    return [
        parts.write_csv(folder, "selection", ["module", *_SHAPE, *_SELECTED], selected_rows),
        parts.write_csv(folder, "neurons_per_layer", layer_columns, layer_rows),
        parts.write_csv(folder, "tokens", ["module", "domain", "tokens"], token_rows),
    ]


def _closeness(
    selection: Mapping[str, Any], module: str, first: str, second: str, jaccard: float
) -> tuple[float, str]:
    """Return the Jaccard index of a pair of domains, and the words on it.

    Two domains with few neurons may be close by chance: they rank last, without words.
    """
    counts = [selection[module]["neurons_per_domain"][name] for name in (first, second)]
    common = round(jaccard / (1 + jaccard) * sum(counts))
    either = sum(counts) - common
    if either < MIN_NEURONS:
        return -1.0, ""
    sentence = (
        f"; the closest pair is {first} and {second} in the {parts.title(module).lower()}, with "
        f"{common:,} common neurons of {either:,} (Jaccard index {jaccard:.2f})"
    )
    return jaccard, sentence


def _cell(value: object) -> object:
    """Return a value for a cell; the values of a list by layer are separated by spaces."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _read_thirds(selected: Mapping[str, Any], name: str) -> str:
    """Return the sentence on the shares of a module's neurons in each third of its layers."""
    counts = np.array(list(selected["per_layer"].values())).sum(axis=0)
    if not counts.sum():
        return f"The {name} has no domain-specific neuron."
    first, middle, last = (
        parts.percent(part.sum() / counts.sum()) for part in np.array_split(counts, 3)
    )
    return (
        f"In the {name}, {first} of the domain-specific neurons lie in the first third of the "
        f"layers, {middle} in the middle and {last} in the last; the peak is "
        f"layer {counts.argmax()}."
    )


def overlap(folder: pathlib.Path, results: Results) -> page.Section:
    """Build the section on the neurons that two domains share."""
    selection, domains = results["selection"], results["domains"]
    pairs = [
        [module, first, domains[j], selected["overlap"][i][j]]
        for module, selected in selection.items()
        for i, first in enumerate(domains)
        for j in range(i + 1, len(domains))
    ]
    counts = {
        module: [selected["domains_per_neuron"].get(str(n), 0) for n in range(len(domains) + 1)]
        for module, selected in selection.items()
    }
    figure = figures.overlap(
        {parts.title(module): np.array(of["overlap"]) for module, of in selection.items()},
        {parts.title(module): count for module, count in counts.items()},
        domains,
    )
    one = sum(count[1] for count in counts.values())
    every = max(1, sum(selected["selected"] for selected in selection.values()))
    closest = max((_closeness(selection, *pair) for pair in pairs), default=(-1.0, ""))
    count_rows = [[module, n, count] for module, of in counts.items() for n, count in enumerate(of)]
    return page.Section(
        title="How domains share neurons",
        reading=f"{parts.percent(one / every)} of the selected neurons belong to exactly one "
        f"domain{closest[1]}.",
        figures=[
            parts.write_figure(
                folder,
                "overlap",
                figure,
                "Overlap of domains, and number of domains per neuron",
                chart=panels.shared(
                    {parts.title(m): np.array(of["overlap"]) for m, of in selection.items()},
                    domains,
                ),
            )
        ],
        note="The Jaccard index is the share of common neurons among the neurons of either domain.",
        data=[
            parts.write_csv(folder, "overlap", ["module", "domain", "other", "jaccard"], pairs),
            parts.write_csv(
                folder, "domains_per_neuron", ["module", "domains", "neurons"], count_rows
            ),
        ],
    )
