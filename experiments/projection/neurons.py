"""Select the neurons of the tasks' domains before and after fine-tuning, and ablate them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

import mllm_jax as mj
from experiments.modules import MODULES
from experiments.projection.context import Arrays, Outputs, Run, Study
from mllm_jax import tokens as tok
from mllm_jax.analysis import domain_neurons, projection, scores, selectors
from mllm_jax.analysis.projection import E2E, ORIGINAL, PROJ
from mllm_jax.sites import Site
from mllm_jax.training import parts

SELECTED, RANDOM = "FT-Neurons", "FT-Random neurons"
Masks = dict[str, np.ndarray]  # bool[L, F] by module


def sites(study: Study) -> dict[str, Site]:
    """Return the sites of neurons; a projector of a single linear map has none."""
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


def domain_masks(study: Study, counts: Arrays, task: str) -> Masks:
    """Return bool[L, F] by module: the neurons of a task's domain among those of all tasks.

    Args:
      study: The study.
      counts: The arrays of a run, with those of `count`.
      task: The name of the task.
    """
    rates, names, modules = study.config.neurons, list(study.tasks), sites(study)
    selected = domain_neurons.select_modules(
        {m: np.stack([counts[f"positive/{m}/{name}"] for name in names]) for m in modules},
        {m: np.stack([counts[f"tokens/{m}/{name}"] for name in names]) for m in modules},
        names=names, top_rate=rates.top_rate, filter_rate=rates.filter_rate,
        bar_rate=rates.bar_rate,
    )  # fmt: skip
    return {module: chosen.mask[names.index(task)] for module, chosen in selected.items()}


def trains_lm(run: Run) -> bool:
    """Return whether a run trains weights of the language model."""
    return run.setting is not None and run.setting.recipe.part != "projector"


def weight_change(before: Any, after: Any) -> dict[str, np.ndarray]:
    """Return `weights/lm`, float32[L, F]: how far fine-tuning turned each neuron's weights (NeFT).

    Args:
      before: The model before fine-tuning.
      after: The model after it.
    """
    name = parts.MLP.format("up")

    def kernel(model: Any) -> Any:
        leaves = jax.tree_util.tree_flatten_with_path(model)[0]
        return next(leaf for path, leaf in leaves if parts.weight_name(path) == name)

    layers = [
        selectors.weight_change(*_by_neuron(old, new))[0, 0]
        for old, new in zip(kernel(before), kernel(after), strict=True)
    ]
    return {"weights/lm": np.stack(layers).astype(np.float32)}


def _by_neuron(old: Any, new: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the weights of a layer, [D, F], as `selectors.weight_change` takes them."""
    before, after = (np.asarray(layer, np.float32).T[None] for layer in (old, new))
    return before, [after]


def most_changed(arrays: Arrays, like: Arrays) -> Masks:
    """Return the neurons whose weights changed most, as many as `like` has in the LM."""
    changed = np.asarray(arrays["weights/lm"], np.float64)[None]
    return {"lm": selectors.top(changed, int(like["lm"].sum()))[0]}


def changed(study: Study, outputs: Outputs) -> Iterator[dict[str, Any]]:
    """Yield the overlap of the neurons of most changed weights with those of the task's domain.

    The change of weights is another selector of neurons, by training rather than by activations; it
    selects as many neurons as the domain has.
    """
    for task, variant, seed, before, after in _before_and_after(study, outputs):
        arrays = outputs[task, variant, seed]
        if "weights/lm" not in arrays:
            continue
        for when, masks in (("before", before), ("after", after)):
            mask, other = masks["lm"], most_changed(arrays, masks)["lm"]
            shared = selectors.overlap({"domain": mask[None], "changed": other[None]})
            yield {
                "task": task, "variant": variant, "seed": seed, "domain neurons": when,
                "neurons": int(mask.sum()), "jaccard": float(shared.jaccard[0, 0, 1]),
                "chance": float(shared.chance[0, 0, 1]),
            }  # fmt: skip


def selected_runs(study: Study, outputs: Outputs) -> Iterator[Run]:
    """Yield runs that train only the neurons of a task's domain, or as many random ones."""
    config, seed = study.config, study.config.seeds[0]
    if not config.neurons.pictures:
        return
    for task in config.neurons.train:
        own = domain_masks(study, outputs[task, ORIGINAL, seed], task)["lm"]
        if not own.any():
            continue
        setting = ml_collections.ConfigDict(config.e2e.to_dict())
        setting.recipe.part = "neurons"
        setting.recipe.rate = config.neurons.rate
        setting.recipe.projector_rate = None
        yield Run(task, SELECTED, seed, setting, own)
        yield Run(task, RANDOM, seed, setting, domain_neurons.random_mask_like(own, seed))


def selected_rows(study: Study, outputs: Outputs) -> Iterator[dict[str, Any]]:
    """Yield the F1 of models whose selected neurons were trained, against the original model."""
    seed = study.config.seeds[0]
    for task in study.config.neurons.train:
        if (task, SELECTED, seed) not in outputs:
            continue
        truth, classes = study.ids(task, "test"), len(study.tasks[task].classes)
        neurons = int(domain_masks(study, outputs[task, ORIGINAL, seed], task)["lm"].sum())
        by_variant = {
            variant: scores.f1(truth, outputs[task, variant, seed]["predicted"][None], classes)
            for variant in (ORIGINAL, SELECTED, RANDOM, E2E)
        }
        for variant, value in by_variant.items():
            yield {
                "task": task, "variant": variant,
                "neurons": neurons if variant in (SELECTED, RANDOM) else None,
                "f1": value.row(),
                "change": None if variant == ORIGINAL
                else scores.change(value, by_variant[ORIGINAL]),
            }  # fmt: skip


def random_controls(study: Study, masks: Arrays) -> dict[str, Masks]:
    """Return masks of equally many random neurons in every layer, by `randomSEED`."""
    return {
        f"random{seed}": {m: domain_neurons.random_mask_like(a, seed) for m, a in masks.items()}
        for seed in range(study.config.neurons.controls)
    }


def moved(study: Study, outputs: Outputs) -> Iterator[dict[str, Any]]:
    """Yield how the neurons of each task's domain moved in the models fine-tuned on the task."""
    for task, variant, seed, before, after in _before_and_after(study, outputs):
        for row in projection.moved(before, after):
            yield {"task": task, "variant": variant, "seed": seed, **row}


def _before_and_after(
    study: Study, outputs: Outputs
) -> Iterator[tuple[str, str, int, Masks, Masks]]:
    """Yield each task, fine-tuning and seed, with the domain's neurons before and after it."""
    if not study.config.neurons.pictures:
        return
    seeds = study.config.seeds
    for task in study.tasks:
        before = domain_masks(study, outputs[task, ORIGINAL, seeds[0]], task)
        for variant in (PROJ, E2E):
            for seed in seeds:
                after = domain_masks(study, outputs[task, variant, seed], task)
                yield task, variant, seed, before, after


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
            if "off/changed" in arrays:
                answers["neurons of most changed weights"] = arrays["off/changed"][None]
            clean = scores.f1(truth, arrays["predicted"][None], classes)
            for ablated, predicted in answers.items():
                value = scores.f1(truth, predicted, classes)
                row = {"task": task, "variant": variant, "ablated": ablated, "neurons": neurons}
                yield row | {"f1": value.row(), "change": scores.change(value, clean)}
