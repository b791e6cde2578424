"""Select the neurons of the tasks' domains before and after fine-tuning, and ablate them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import mllm_jax as mj
from experiments.modules import MODULES
from experiments.projection.context import Arrays, Outputs, Study
from mllm_jax import tokens as tok
from mllm_jax.analysis import domain_neurons, projection
from mllm_jax.analysis.projection import E2E, ORIGINAL, PROJ
from mllm_jax.sites import Site


def sites(study: Study) -> dict[str, Site]:
    """Return the sites of neurons: a projector of a single linear map has none."""
    modules = ("projector", "lm") if study.model.config.projector.depth > 1 else ("lm",)
    return {module: MODULES[module] for module in modules}


def count(study: Study, model: Any) -> dict[str, np.ndarray]:
    """Count activations over the image tokens of each task's pictures.

    Returns:
        `positive/MODULE/TASK`, int64[L, F], and `tokens/MODULE/TASK`.
    """
    captures = {m: mj.stats(site, where=tok.image) for m, site in sites(study).items()}
    counts = {}
    for name in study.tasks:
        questions = study.neutral_questions(name, "train", study.config.neurons.pictures)
        total = mj.reduce(captures, model, questions, label=f"count, {name}")
        for module, stats in total.items():
            counts[f"positive/{module}/{name}"] = stats.positive
            counts[f"tokens/{module}/{name}"] = stats.tokens[0]
    return counts


def domain_masks(study: Study, counts: Arrays, task: str) -> dict[str, np.ndarray]:
    """Return bool[L, F] by module: the neurons of a task's domain among those of all tasks.

    Args:
        study: the study.
        counts: the arrays of a run, with those of `count`.
        task: the name of the task.
    """
    rates, names, modules = study.config.neurons, list(study.tasks), sites(study)
    selected = domain_neurons.select_modules(
        {m: np.stack([counts[f"positive/{m}/{name}"] for name in names]) for m in modules},
        {m: np.stack([counts[f"tokens/{m}/{name}"] for name in names]) for m in modules},
        names=names, top_rate=rates.top_rate, filter_rate=rates.filter_rate,
        bar_rate=rates.bar_rate,
    )  # fmt: skip
    return {module: chosen.mask[names.index(task)] for module, chosen in selected.items()}


def random_controls(study: Study, masks: Arrays) -> dict[str, dict[str, np.ndarray]]:
    """Return masks of equally many random neurons in every layer, by `randomSEED`."""
    return {
        f"random{seed}": {m: domain_neurons.random_mask_like(a, seed) for m, a in masks.items()}
        for seed in range(study.config.neurons.controls)
    }


def moved(study: Study, outputs: Outputs) -> Iterator[dict[str, Any]]:
    """Yield how the neurons of each task's domain moved in the model that was tuned to it."""
    if not study.config.neurons.pictures:
        return
    seed = study.config.seeds[0]
    for task in study.tasks:
        before = domain_masks(study, outputs[task, ORIGINAL, seed], task)
        for variant in (PROJ, E2E):
            after = domain_masks(study, outputs[task, variant, seed], task)
            for row in projection.moved(before, after):
                yield {"task": task, "variant": variant, **row}


def ablation_rows(study: Study, outputs: Outputs) -> Iterator[dict[str, Any]]:
    """Yield the F1 with the neurons of a task's domain ablated, and with random ones."""
    if not study.config.neurons.pictures:
        return
    seed = study.config.seeds[0]
    for task in study.tasks:
        truth, classes = study.ids(task, "test"), len(study.tasks[task].classes)
        for variant in study.config.depth:
            arrays = outputs[task, variant, seed]
            neurons = sum(int(m.sum()) for m in domain_masks(study, arrays, task).values())
            random = [arrays[f"off/random{i}"] for i in range(study.config.neurons.controls)]
            answers = {"its domain's neurons": arrays["off/own"][None]}
            if random:
                answers["random neurons"] = np.stack(random)
            clean = projection.f1(truth, arrays["predicted"][None], classes)
            for ablated, predicted in answers.items():
                value = projection.f1(truth, predicted, classes)
                row = {"task": task, "variant": variant, "ablated": ablated, "neurons": neurons}
                yield row | {"f1": value.row(), "change": projection.change(value, clean)}
