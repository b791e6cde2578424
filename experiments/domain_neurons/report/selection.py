"""Sections of the report on the selected neurons and their overlap."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.domain_neurons.report import plots
from mllm_jax.report import figures, page, parts

CHOSEN = {
    "entropy": "Selected are the neurons whose probability of being active, normalised over the "
    "domains, has the lowest entropy (DAPE), among those that are often active in some domain.",
    "given": "The neurons come from a file.",
    "other": "Selected are the best neurons of each domain by another selector, as many as the "
    "entropy (DAPE) takes.",
}


def neurons(folder: pathlib.Path, results: Mapping) -> page.Section:
    """Build the section on the number of selected neurons by module and layer."""
    selection, modules, domains = results["selection"], results["modules"], results["domains"]
    shape, chosen = ["site", "layers", "width"], ["k", "threshold", "bar", "selected", "share"]
    selected_rows = [
        [module, *(modules[module][c] for c in shape), *(_one(found[c]) for c in chosen)]
        for module, found in selection.items()
    ]
    layer_rows = [
        [module, domain, layer, count]
        for module, found in selection.items()
        for domain, counts in found["per_layer"].items()
        for layer, count in enumerate(counts)
    ]
    token_rows = [
        [module, domain, count]
        for module, by_domain in results["tokens"].items()
        for domain, count in by_domain.items()
    ]
    table = [
        [
            parts.name(module),
            f"{modules[module]['layers'] * modules[module]['width']:,}",
            f"{found['selected']:,}",
            f"{100 * found['share']:.2f} %",
            *(f"{found['neurons_per_domain'][domain]:,}" for domain in domains),
        ]
        for module, found in selection.items()
    ]
    figure = plots.neurons_per_layer(
        {parts.name(module): found["per_layer"] for module, found in selection.items()},
        {
            parts.name(
                module
            ): f"{size['site']} · {size['layers']} \N{MULTIPLICATION SIGN} {size['width']:,}"
            for module, size in modules.items()
        },
    )
    deepest = max(selection, key=lambda module: modules[module]["layers"])
    totals = {d: sum(s["neurons_per_domain"][d] for s in selection.values()) for d in domains}
    most, least = max(totals, key=totals.get), min(totals, key=totals.get)
    return page.Section(
        title="Where the neurons are",
        reading=f"{_thirds(selection[deepest], parts.name(deepest).lower())} Most neurons belong "
        f"to {most} ({totals[most]:,}), fewest to {least} ({totals[least]:,}).",
        figures=[
            parts.png(folder, "neurons", figure, "Neurons of each domain by module and layer")
        ],
        table=page.Table(["module", "neurons", "selected", "share", *domains], table),
        note=f"{CHOSEN.get(results['selector'], CHOSEN['other'])} A neuron "
        "belongs to every domain in which it passes the bar, so the domains may add up to "
        "more than the selection.",
        data=[
            parts.csv(folder, "selection", ["module", *shape, *chosen], selected_rows),
            parts.csv(
                folder, "neurons_per_layer", ["module", "domain", "layer", "neurons"], layer_rows
            ),
            parts.csv(folder, "tokens", ["module", "domain", "tokens"], token_rows),
        ],
    )


def _one(value) -> object:
    """A number as it is; those of layers side by side."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _thirds(found: Mapping, name: str) -> str:
    """How the neurons of a module lie over its layers."""
    counts = np.array(list(found["per_layer"].values())).sum(axis=0)
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


def overlap(folder: pathlib.Path, results: Mapping) -> page.Section:
    """Build the section on the neurons that two domains share."""
    selection, domains = results["selection"], results["domains"]
    pairs = [
        [module, first, domains[j], found["overlap"][i][j]]
        for module, found in selection.items()
        for i, first in enumerate(domains)
        for j in range(i + 1, len(domains))
    ]
    counts = {
        module: [found["domains_per_neuron"].get(str(n), 0) for n in range(len(domains) + 1)]
        for module, found in selection.items()
    }
    figure = figures.overlap(
        {parts.name(module): np.array(found["overlap"]) for module, found in selection.items()},
        {parts.name(module): count for module, count in counts.items()},
        domains,
    )
    one = sum(count[1] for count in counts.values())
    every = max(1, sum(found["selected"] for found in selection.values()))
    module, first, second, value = max(pairs, key=lambda pair: pair[3])
    return page.Section(
        title="How domains share neurons",
        reading=f"{parts.percent(one / every)} of the selected neurons belong to exactly one "
        f"domain; the closest pair is {first} and {second} in the {parts.name(module).lower()}, "
        f"with a Jaccard index of {value:.2f}.",
        figures=[
            parts.png(
                folder, "overlap", figure, "Overlap of domains, and number of domains per neuron"
            )
        ],
        note="The Jaccard index is the share of common neurons among the neurons of either domain.",
        data=[
            parts.csv(folder, "overlap", ["module", "domain", "other", "jaccard"], pairs),
            parts.csv(
                folder,
                "domains_per_neuron",
                ["module", "domains", "neurons"],
                [[module, n, c] for module, count in counts.items() for n, c in enumerate(count)],
            ),
        ],
    )
