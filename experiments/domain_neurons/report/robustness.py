"""Sections of the main study on its own footing: sample, chance, choices, and features."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.domain_neurons.report import plots
from mllm_jax.report import figures, page, parts

SELECTORS = {
    "entropy": "entropy", "auroc": "AUROC", "difference": "mean difference",
    "attribution": "attribution", "random": "random",
}  # fmt: skip
FIELDS = {
    "scope": "tokens counted", "thresholds": "thresholds by", "assign": "domains of a neuron",
    "compat": "procedure",
}  # fmt: skip


def stability(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Would other examples, and shuffled domains, give the same?"""
    found = {module: test for module, test in results["stability"].items() if test}
    if not found:
        return None
    domains = results["domains"]
    rows = [
        [
            parts.name(module),
            f"{np.mean(test['halves'][-1]):.2f}",
            f"{np.mean(test['bootstrap']['value']):.2f}",
            f"{test['stable']:,}",
            _nats(test["lowest_entropy"]),
            _nats(test["shuffled_entropy"]),
            page.DASH
            if test["beyond_chance"] is None
            else f"{test['beyond_chance']:,} of {results['selection'][module]['selected']:,}",
        ]
        for module, test in found.items()
    ]
    tested = {module: test for module, test in found.items() if test["beyond_chance"] is not None}
    beyond = sum(test["beyond_chance"] for test in tested.values())
    selected = sum(results["selection"][module]["selected"] for module in tested)
    level = next(iter(found.values()))["level"]
    verdict = (
        f"{beyond:,} of {selected:,} selected neurons have a lower entropy than the lowest that "
        f"shuffled domains give in {parts.percent(1 - level)} of all shuffles; a rate of the best "
        "one percent always selects that many."
        if tested
        else "These are too few groups of examples to tell: shuffled domains often are the true "
        "ones again. More pictures tell, or more groups of them (config.groups)."
    )
    return page.Section(
        title="More than chance?",
        reading=verdict,
        figures=[
            parts.png(
                folder, "stability",
                plots.halves({parts.name(m): test for m, test in found.items()}, domains),
                "Neurons that two halves of the examples share, by their size",
            )
        ],
        table=page.Table(
            [
                "module", "shared by halves", "shared by resamples", "in 95 % of them",
                "lowest entropy", "of shuffles", "beyond chance",
            ],
            rows,
        ),
        note="Whole groups of examples are split into two halves, drawn again with replacement, "
        "or given to domains at random. Shared: Jaccard index, the mean over domains. Beyond "
        f"chance: the chance of even one such neuron in a module is {parts.percent(level)} if "
        "domains do not matter (Westfall and Young's minimum). Entropies in nats.",
        data=[
            parts.csv(
                folder, "stability", ["module", "domain", "examples", "jaccard"],
                [
                    [module, domain, size, shared[d]]
                    for module, test in found.items()
                    for size, shared in zip(test["examples"], test["halves"], strict=True)
                    for d, domain in enumerate(domains)
                ],
            )
        ],
    )  # fmt: skip


def _nats(value: float | None) -> str:
    return page.DASH if value is None else f"{value:.2f}"


def comparison(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Do other selectors and settings take the same neurons?"""
    found = results["comparison"]
    if not found:
        return None
    domains, names = results["domains"], [SELECTORS[name] for name in found["selectors"]]
    deepest = max(found["modules"], key=lambda module: results["modules"][module]["layers"])
    shown = found["modules"][deepest]
    pairs = [
        [module, domain, names[b], names[a], of["jaccard"][d][a][b], of["chance"][d][a][b]]
        for module, of in found["modules"].items()
        for d, domain in enumerate(domains)
        for a in range(len(names))
        for b in range(a)
    ]
    mean = np.mean(shown["jaccard"], axis=0)
    chance = np.mean(shown["chance"], axis=0)
    nearest = 1 + int(mean[0, 1:].argmax())
    return page.Section(
        title="Other ways to choose",
        reading=f"In the {parts.name(deepest).lower()}, {names[nearest]} shares most neurons with "
        f"{names[0]}: a Jaccard index of {mean[0, nearest]:.2f}, where chance gives "
        f"{chance[0, nearest]:.2f}. The table tells how far other settings of the same rule "
        "change what is found.",
        figures=[
            parts.png(
                folder, "selectors",
                figures.overlap(
                    dict(zip(domains, map(np.array, shown["jaccard"]), strict=True)),
                    dict(zip(domains, shown["selectors_per_neuron"], strict=True)),
                    names, members="selectors that take a neuron",
                ),
                f"Neurons that selectors share in the {parts.name(deepest).lower()}, by domain",
            )
        ],
        table=page.Table(
            ["setting", "instead", *(parts.name(module) for module in found["modules"])],
            [
                [FIELDS[row["field"]], row["value"], *(f"{j:.2f}" for j in row["jaccard"].values())]
                for row in found["settings"]
            ],
        ),
        note="Every selector takes as many neurons of a domain as the entropy does. AUROC: how "
        "well the mean activation of a group of examples tells its domain (AurA); mean difference: "
        "in standard deviations; attribution: gradient of the right answers' likelihood. The "
        "table: Jaccard index with the study's own neurons if one setting is another, the mean "
        "over domains.",
        data=[
            parts.csv(
                folder, "selectors",
                ["module", "domain", "selector", "other", "jaccard", "chance"], pairs,
            ),
            parts.csv(
                folder, "settings", ["setting", "instead", "module", "jaccard", "selected"],
                [
                    [row["field"], row["value"], module, shared, row["selected"][module]]
                    for row in found["settings"]
                    for module, shared in row["jaccard"].items()
                ],
            ),
        ],
    )  # fmt: skip
