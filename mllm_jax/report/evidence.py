"""Sections of the main study on its own footing: sample, chance, choices, and features."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import figures, page, parts

SELECTORS = {
    "entropy": "entropy", "auroc": "AUROC", "difference": "mean difference",
    "attribution": "attribution", "random": "random",
}  # fmt: skip
FIELDS = {
    "scope": "tokens counted", "thresholds": "thresholds by", "assign": "domains of a neuron",
    "compat": "procedure",
}  # fmt: skip


def steadiness(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Would other examples, and shuffled domains, give the same?"""
    found = {module: test for module, test in results["steadiness"].items() if test}
    if not found:
        return None
    domains = results["domains"]
    rows = [
        [
            parts.name(module),
            f"{np.mean(test['halves'][-1]):.2f}",
            f"{np.mean(test['bootstrap']['value']):.2f}",
            f"{test['always']:,}",
            _nats(test["lowest"]),
            _nats(test["shuffled"]),
            f"{test['beyond']:,} of {results['selection'][module]['selected']:,}",
        ]
        for module, test in found.items()
    ]
    beyond = sum(test["beyond"] for test in found.values())
    selected = sum(results["selection"][module]["selected"] for module in found)
    level = next(iter(found.values()))["level"]
    return page.Section(
        title="More than chance?",
        reading=f"{beyond:,} of {selected:,} selected neurons have a lower entropy than the lowest "
        f"that shuffled domains give in {parts.percent(1 - level)} of all shuffles; a rate of the "
        "best one percent always selects that many.",
        figures=[
            parts.png(
                folder, "steadiness", halves({parts.name(m): t for m, t in found.items()}, domains),
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
                folder, "steadiness", ["module", "domain", "examples", "jaccard"],
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


@figures.styled
def halves(found: Mapping[str, Mapping], domains: list[str]) -> Figure:
    """Jaccard index of the neurons of two halves by their size, a panel a module.

    Args:
        found: {module: {"examples": int[S], "halves": float[S, D_]}}.
    """
    hue = figures.palette(domains)
    figure = Figure(figsize=(11, 2.9))
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for ax, (module, test) in zip(panels, found.items(), strict=True):
        for domain, shared in zip(domains, np.transpose(test["halves"]), strict=True):
            ax.plot(test["examples"], shared, "o-", markersize=4, color=hue[domain], label=domain)
        ax.set(title=module, xlabel="examples of a domain in a half", ylim=(0, 1))
        ax.set_xticks(test["examples"])
        ax.grid(axis="y")
    panels[0].set_ylabel("shared neurons (Jaccard)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=8.5
    )
    return figure


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


def features(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Do pictures of a domain lie together, before and after the projector?"""
    found = results["features"]
    if not found:
        return None
    shares = parts.listed(
        [
            f"{parts.percent(of['between'])} in the {parts.name(m).lower()}"
            for m, of in found.items()
        ]
    )
    return page.Section(
        title="Pictures of a domain lie together",
        reading=f"Differences between domains are {shares} of all variance among the mean features "
        "of pictures.",
        figures=[
            parts.png(
                folder, "features", scatter({parts.name(m): of for m, of in found.items()}),
                "Two principal components of the pictures' features, by domain",
            )
        ],
        note="The mean over the image tokens of each picture, as the vision encoder and as the "
        "projector gives it, on the two directions in which pictures vary most.",
        data=[
            parts.csv(
                folder, "features", ["module", "domain", "first", "second"],
                [
                    [module, domain, *point]
                    for module, of in found.items()
                    for domain, points in of["points"].items()
                    for point in points
                ],
            )
        ],
    )  # fmt: skip


@figures.styled
def scatter(found: Mapping[str, Mapping]) -> Figure:
    """Points of two principal components, a panel a module, each domain's name at its middle.

    Args:
        found: {module: {"points": {domain: float[N, 2]}, "share": float[2]}}.
    """
    hue = figures.palette(list(next(iter(found.values()))["points"]))
    figure = Figure(figsize=(11, 4.4))
    for ax, (module, of) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        for domain, points in of["points"].items():
            x, y = np.transpose(points)
            ax.plot(x, y, "o", markersize=4.5, color=hue[domain], alpha=0.55, markeredgewidth=0)
            ax.text(
                x.mean(), y.mean(), domain, color=figures.dark(hue[domain]), ha="center",
                va="center", fontweight="bold", path_effects=figures.halo(),
            )  # fmt: skip
        first, second = (f"{100 * share:.0f} % of the variance" for share in of["share"])
        ax.set(title=module, xlabel=f"first component, {first}", ylabel=f"second, {second}")
        ax.set(xticks=[], yticks=[])
    return figure
