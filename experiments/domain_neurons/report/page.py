"""The page of the domain-neuron study."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

from experiments.domain_neurons.report import ablation, layers, plots, robustness, selection
from mllm_jax.report import page, parts

KEYS = (
    "model", "domains", "modules", "tokens", "selection", "stability", "comparison", "baseline",
    "ablation", "against_random", "lens", "stages", "features", "pictures",
)  # fmt: skip


def write(workdir: str | os.PathLike, results: Mapping) -> None:
    """Writes figures/*.png, tables/*.csv and, last of all, index.html.

    Args:
        workdir: the study's folder, which holds the pictures that the results name.
        results: what results.json holds. A part that is empty has no section on the page.
    """
    parts.require(results, KEYS, "domain_neurons")
    folder = pathlib.Path(workdir)
    made = (
        ablation.accuracy, selection.neurons, selection.overlap, robustness.stability,
        robustness.comparison, ablation.changes,
        ablation.deviation, layers.lens, layers.features, layers.pictures,
    )  # fmt: skip
    sections = [section for part in made if (section := part(folder, results))]
    content = page.Page(
        title="Domain-specific neurons",
        lead=f"Which neurons of {page.edited(results)} fire in one visual domain and hardly in the "
        "others, what happens when they are switched off, and what image tokens say on their way "
        f"up? Domains: {parts.listed(results['domains'])}.",
        facts=_facts(results),
        figure=_overview(folder, results),
        sections=sections,
        data=page.RECORDS,
    )
    page.write(folder / "index.html", content)


def _facts(results: Mapping) -> list[tuple[str, str]]:
    chosen = sum(found["selected"] for found in results["selection"].values())
    of = sum(shape["layers"] * shape["width"] for shape in results["modules"].values())
    tokens = sum(sum(by_domain.values()) for by_domain in results["tokens"].values())
    questions = sum(score["n"] for score in results["baseline"].values())
    facts = [
        (f"{len(results['domains'])}", "domains"),
        (f"{tokens:,}", "tokens counted"),
        (f"{chosen:,}", f"of {of:,} neurons selected"),
        (f"{questions:,}", "test questions"),
        (f"{len(results['ablation']):,}", "ablation runs"),
    ]
    return [fact for fact in facts if fact[0] != "0"]


def _overview(folder: pathlib.Path, results: Mapping) -> page.Figure | None:
    module, lens = ablation.widest(results), results["lens"]
    if module is None or not lens:
        return None
    kind, name = layers.token_kinds(lens)[0], parts.name(module).lower()
    tokens = None
    if results["pictures"]:
        shown = results["pictures"][0]
        title = f"Image tokens at layer {shown['layers'][-1]}"
        tokens = (
            layers.read_picture(folder, shown),
            shown["words"][-1],
            shown["entropy"][-1],
            title,
        )
    figure = plots.overview(
        tokens,
        {domain: curves[kind] for domain, curves in lens.items() if kind in curves},
        results["stages"]["all"],
        *ablation.change_matrix(results, module, control=False),
        {"curves": f"Entropy of {kind} tokens", "matrix": f"Accuracy change, {name}"},
    )
    words = (
        "Left: image tokens, the surer the lens the deeper, with its most likely word where there "
        "is room. Then: e"
    )
    return parts.png(
        folder,
        "overview",
        figure,
        "Words read from image tokens, entropy by layer, and the ablation matrix",
        f"{words if tokens else 'E'}ntropy of the logit lens by layer and domain, with stage "
        f"boundaries. Right: change of accuracy, in points, with a domain's neurons off in {name}; "
        "* marks changes beyond chance.",
    )
