"""The report of the domain-neuron study: its sections, facts and overview."""

from __future__ import annotations

import pathlib

from experiments.domain_neurons.report import (
    ablation,
    claims,
    deviation,
    effects,
    layers,
    neurons,
    plots,
    robustness,
    selection,
    sparsity,
    words,
)
from mllm_jax.report import page, parts
from mllm_jax.report.report import Report, Results

KEYS = (
    "model", "domains", "modules", "tokens", "selection", "stability", "comparison", "released",
    "ablated", "baseline", "ablation", "controls", "effects", "power", "deviation_layers",
    "deviation_by_layer", "questions", "lens", "lens_top", "lens_words", "lens_sites",
    "sparsity", "stages", "features", "pictures", "evidence", "claims",
)  # fmt: skip


def _lead(results: Results) -> str:
    return (
        f"Which neurons of {page.model_name(results)} are active in one visual domain and rarely "
        "in the others, how does the model change when they are ablated, and which words does a "
        "logit lens read from image tokens, layer by layer? Domains: "
        f"{parts.join_words(results['domains'])}."
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    selected = sum(of_module["selected"] for of_module in results["selection"].values())
    neurons = sum(module["layers"] * module["width"] for module in results["modules"].values())
    tokens = sum(results["tokens"].get("lm", {}).values())
    questions = sum(score["n"] for score in results["baseline"].values())
    facts = [
        (f"{len(results['domains'])}", "domains"),
        (f"{tokens:,}", "tokens of the language model counted"),
        (f"{selected:,}", f"of {neurons:,} neurons selected"),
        (f"{questions:,}", "test questions"),
        (f"{len(results['ablation']):,}", "ablation runs"),
    ]
    return [fact for fact in facts if fact[0] != "0"]


def _overview(folder: pathlib.Path, results: Results) -> page.Figure | None:
    """Write the summary figure; None if there was no ablation or no lens."""
    module, lens = ablation.widest_module(results), results["lens"]
    if module is None or not lens:
        return None
    kind, name = layers.token_kinds(lens)[0], parts.title(module).lower()
    tokens = None
    if results["pictures"]:
        picture = results["pictures"][0]
        tokens = plots.TokenPanel(
            layers.read_picture(folder, picture), picture["words"][-1], picture["entropy"][-1],
            f"Image tokens at layer {picture['layers'][-1]}",
        )  # fmt: skip
    figure = plots.overview(
        tokens,
        {domain: curves[kind] for domain, curves in lens.items() if kind in curves},
        results["stages"]["all"],
        *ablation.change_matrix(results, module),
        {"curves": f"Entropy of {kind} tokens", "matrix": f"Accuracy change, {name}"},
        ablation.colour_bound(results),
    )
    left = (
        "Left: the most likely word of a logit lens at each image token, if space allows; the "
        "lower the entropy, the deeper the colour. Middle: e"
    )
    return parts.write_figure(
        folder, "overview", figure,
        "Words read from image tokens, entropy by layer, and the ablation matrix",
        f"{left if tokens else 'E'}ntropy of the logit lens by layer and domain, with stage "
        "boundaries. Right: change of accuracy, in percentage points, with a domain's neurons "
        f"ablated in {name}; * marks changes beyond chance.",
    )  # fmt: skip


REPORT = Report(
    study="domain_neurons",
    keys=KEYS,
    title="Domain-specific neurons",
    lead=_lead,
    facts=_facts,
    overview=_overview,
    sections=(
        claims.claims, ablation.accuracy, selection.neurons, neurons.single,
        selection.overlap, robustness.stability, words.released, robustness.comparison,
        ablation.changes, effects.effects, deviation.last_layer, deviation.by_layer, layers.lens,
        layers.words, sparsity.sparsity, sparsity.sites, layers.features, layers.pictures,
    ),
)  # fmt: skip
write, preview = REPORT.write, REPORT.preview
