"""Sections of the report on how far a selection depends on chance, on its rule and its settings."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.domain_neurons.report import panels, plots
from mllm_jax.report import figures, page, parts
from mllm_jax.report.report import Results

SELECTORS = {
    "entropy": "entropy", "auroc": "AUROC", "difference": "mean difference",
    "attribution": "attribution", "random": "random",
}  # fmt: skip
FIELDS = {
    "prompts": "prompts", "scope": "tokens counted", "thresholds": "thresholds by",
    "assign": "domains of a neuron", "compat": "procedure",
}  # fmt: skip


def stability(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on other examples and shuffled domains; None where not measured."""
    by_module = {module: test for module, test in results["stability"].items() if test}
    if not by_module:
        return None
    domains, selection = results["domains"], results["selection"]
    rows = [_stability_row(m, test, selection[m]["selected"]) for m, test in by_module.items()]
    figure = plots.halves({parts.title(m): test for m, test in by_module.items()}, domains)
    level = next(iter(by_module.values()))["level"]
    return page.Section(
        title="More than chance?",
        reading=_read_stability(by_module, selection, level),
        figures=[
            parts.write_figure(
                folder, "stability", figure,
                "Neurons that two halves of the examples share, by their size",
                chart=panels.halves(by_module, domains),
            )
        ],
        table=page.Table(
            [
                "module", "shared by halves", "shared by resamples", "in 95 % of them",
                "lowest entropy", "of shuffles", "beyond chance",
            ],
            rows,
        ),
        note="Whole groups of examples are split into two halves, resampled with replacement, "
        "or assigned to domains at random. Shared: Jaccard index, the mean over domains. Beyond "
        f"chance: the chance of even one such neuron in a module is {parts.percent(level)} if "
        "domains do not matter (Westfall and Young's minimum). Entropies in nats.",
        data=[_stability_csv(folder, by_module, domains)],
    )  # fmt: skip


def _stability_row(module: str, test: Mapping[str, Any], selected: int) -> list[str]:
    beyond = test["beyond_chance"]
    return [
        parts.title(module),
        f"{np.mean(test['halves'][-1]):.2f}",
        f"{np.mean(test['bootstrap']['value']):.2f}",
        f"{test['stable']:,}",
        _format_nats(test["lowest_entropy"]),
        _format_nats(test["shuffled_entropy"]),
        page.DASH if beyond is None else f"{beyond:,} of {selected:,}{_share(beyond, selected)}",
    ]


def _read_stability(
    by_module: Mapping[str, Mapping[str, Any]], selection: Results, level: float
) -> str:
    """Return the sentence on how many neurons are selected beyond chance."""
    tested = {m: test for m, test in by_module.items() if test["beyond_chance"] is not None}
    if not tested:
        return (
            "These are too few groups of examples to tell: shuffled domains are often the true "
            "ones again. More pictures tell, or more groups of them (config.groups)."
        )
    counts = [
        f"{test['beyond_chance']:,} of {selection[module]['selected']:,} in "
        f"the {parts.title(module).lower()}"
        for module, test in tested.items()
    ]
    return (
        f"{parts.join_words(counts)} have a lower entropy than the lowest that shuffled domains "
        f"give in {parts.percent(1 - level)} of all shuffles; a rate of the best one percent "
        "always selects that many."
    )


def _share(beyond: int, selected: int) -> str:
    """Return the share of selected neurons that are beyond chance, in brackets."""
    return f" ({parts.percent(beyond / selected)})" if selected else ""


def _stability_csv(
    folder: pathlib.Path, by_module: Mapping[str, Mapping[str, Any]], domains: list[str]
) -> tuple[str, str]:
    rows = [
        [module, domain, size, shared[d]]
        for module, test in by_module.items()
        for size, shared in zip(test["examples"], test["halves"], strict=True)
        for d, domain in enumerate(domains)
    ]
    return parts.write_csv(folder, "stability", ["module", "domain", "examples", "jaccard"], rows)


def _format_nats(value: float | None) -> str:
    return page.DASH if value is None else f"{value:.2f}"


def comparison(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on other selectors and settings; None where not measured."""
    comparison = results["comparison"]
    if not comparison:
        return None
    domains, by_module = results["domains"], comparison["modules"]
    names = [SELECTORS[name] for name in comparison["selectors"]]
    deepest = max(by_module, key=lambda module: results["modules"][module]["layers"])
    overlap = by_module[deepest]
    jaccard, chance = (np.mean(overlap[key], axis=0) for key in ("jaccard", "chance"))
    nearest = 1 + int(jaccard[0, 1:].argmax())
    figure = figures.overlap(
        dict(zip(domains, map(np.array, overlap["jaccard"]), strict=True)),
        dict(zip(domains, overlap["selectors_per_neuron"], strict=True)),
        names, members="selectors of a neuron",
    )  # fmt: skip
    return page.Section(
        title="Other selectors and settings",
        reading=f"In the {parts.title(deepest).lower()}, {names[nearest]} shares most neurons with "
        f"{names[0]}: a Jaccard index of {jaccard[0, nearest]:.2f}, where chance gives "
        f"{chance[0, nearest]:.2f}. The table shows how far other settings of the same rule "
        "change the selection.",
        figures=[
            parts.write_figure(
                folder, "selectors", figure,
                f"Neurons that selectors share in the {parts.title(deepest).lower()}, by domain",
                chart=panels.shared(
                    dict(zip(domains, map(np.array, overlap["jaccard"]), strict=True)), names
                ),
            )
        ],
        table=page.Table(
            ["setting", "instead", *(parts.title(module) for module in by_module)],
            [
                [FIELDS[row["field"]], row["value"], *(f"{j:.2f}" for j in row["jaccard"].values())]
                for row in comparison["settings"]
            ],
        ),
        note="Every selector selects as many neurons of a domain as the entropy does. AUROC: how "
        "well the mean activation of a picture predicts its domain (AurA), ties by the size of "
        "the effect; mean difference: "
        "in standard deviations; attribution: gradient of the likelihood of right answers. Table: "
        "Jaccard index with the study's own neurons if one setting is changed, mean over domains.",
        data=[
            _selectors_csv(folder, by_module, domains, names),
            _settings_csv(folder, comparison["settings"]),
        ],
    )  # fmt: skip


def _selectors_csv(
    folder: pathlib.Path,
    by_module: Mapping[str, Mapping[str, Any]],
    domains: list[str],
    names: list[str],
) -> tuple[str, str]:
    rows = [
        [module, domain, names[b], names[a], of["jaccard"][d][a][b], of["chance"][d][a][b]]
        for module, of in by_module.items()
        for d, domain in enumerate(domains)
        for a in range(len(names))
        for b in range(a)
    ]
    columns = ["module", "domain", "selector", "other", "jaccard", "chance"]
    return parts.write_csv(folder, "selectors", columns, rows)


def _settings_csv(folder: pathlib.Path, settings: list[Mapping[str, Any]]) -> tuple[str, str]:
    rows = [
        [row["field"], row["value"], module, shared, row["selected"][module]]
        for row in settings
        for module, shared in row["jaccard"].items()
    ]
    columns = ["setting", "instead", "module", "jaccard", "selected"]
    return parts.write_csv(folder, "settings", columns, rows)
