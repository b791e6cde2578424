"""The steps of the projection study, in order; see `experiments/projection/__main__.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import context, examples
from experiments.projection import neurons, probes, suppression, tuning
from experiments.projection.context import Outputs, Run, Study, stack_seeds
from experiments.projection.report import page
from mllm_jax import store
from mllm_jax.analysis import projection
from mllm_jax.analysis.projection import CLIP, E2E, ORIGINAL, PROJ
from mllm_jax.data import classification, tasks
from mllm_jax.evaluation import answers, zero_shot
from mllm_jax.loading import clip
from mllm_jax.training import fit

ANSWERS = "scores", "free"
# Of the evaluated questions, and of each setting of fine-tuning.
SETTINGS = {
    "wording": tuple(answers.WORDINGS), "aspect": ("pad", "square"), "start": ("tuned", "random")
}  # fmt: skip


def run(config: ml_collections.ConfigDict, workdir: store.Workdir) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_projection.py.
      workdir: The folder of its steps and results.
    """
    _check(config)
    model, processor = mj.load(config.model, projector=config.projector or None)
    study = Study(
        config=config, workdir=workdir, model=model, processor=processor, tasks=_tasks(config)
    )
    _check_tasks(study)
    study.claim(study.content())
    zero_shot_answers = match(study)
    runs = (*_main_runs(study), *_factor_runs(study))
    outputs = {run.key: tuning.measure(study, run) for run in runs}
    selected_runs = tuple(neurons.selected_runs(study, outputs))
    outputs |= {run.key: tuning.measure(study, run) for run in selected_runs}
    judged = {
        name: projection.Task(
            study.ids(name, "test"), len(task.classes),
            zero_shot_answers[name] | _answers(study, outputs, name),
            {kind: probes.read(study, outputs, name, kind) for kind in probes.names(study, name)},
        )
        for name, task in study.tasks.items()
    }  # fmt: skip
    factor_tasks = config.factors.tasks
    results = {
        "study": "projection",
        "model": config.model,
        "projector": config.projector,
        "seeds": list(config.seeds),
        "tasks": {name: _describe(study, name) for name in study.tasks},
        "answers": [r for name, task in judged.items() for r in _answer_rows(study, name, task)],
        "richness": [row for name, task in judged.items() for row in _probe_rows(name, task)],
        "claims": projection.claims(judged),
        "controls": projection.claims(judged, projection.controls(probes.NAMES[1:])),
        "rule": projection.RULE,
        "depth": [row for name in study.tasks for row in probes.depth(study, outputs, name)],
        "factors": [row for name in factor_tasks for row in probes.factors(study, outputs, name)],
        "neurons": list(neurons.moved(study, outputs)),
        "changed": list(neurons.changed(study, outputs)),
        "trained": list(neurons.selected_rows(study, outputs)),
        "ablation": [*neurons.ablation_rows(study, outputs), *suppression.suppress(study)],
        "losses": {
            run.name: outputs[run.key]["losses"].tolist()
            for run in (*runs, *selected_runs)
            if run.setting
        },
    }
    study.finish(results, page.write)
    print(f"finished: {workdir / 'index.html'}")


def _check(config: ml_collections.ConfigDict) -> None:
    """Refuse a wrong config before anything is read."""
    for variant in config.depth:
        context.require_choice("config.depth", variant, (ORIGINAL, PROJ, E2E))
    if config.neurons.train and not config.neurons.pictures:
        raise ValueError("config.neurons.train: set config.neurons.pictures, which select neurons")
    if unknown := [seed for seed in config.factors.seeds if seed not in config.seeds]:
        raise ValueError(f"config.factors.seeds: {unknown[0]} is not one of config.seeds")
    context.require_choice("config.answers", config.answers, ANSWERS)
    changed = {f"factors.changes.{name}": _changed(config, name) for name in config.factors.changes}
    for field, setting in {"": config, "proj": config.proj, "e2e": config.e2e, **changed}.items():
        for name, choices in SETTINGS.items():
            if name in setting:
                at = ".".join(filter(None, ("config", field, name)))
                context.require_choice(at, setting[name], choices)
    for setting in (config.proj, config.e2e, *changed.values()):
        fit.Recipe.of(setting.recipe.to_dict())  # refuse wrong numbers


def _check_tasks(study: Study) -> None:
    """Raise ValueError if a setting names a task that the study does not have."""
    config = study.config
    for field, named in (
        ("factors.tasks", config.factors.tasks), ("neurons.train", config.neurons.train),
        ("suppress.task", (config.suppress.task,) if config.suppress.task else ()),
    ):  # fmt: skip
        for task in named:
            context.require_choice(f"config.{field}", task, study.tasks)
    if config.suppress.task:
        suppression.check(study)


def _tasks(config: ml_collections.ConfigDict) -> dict[str, tasks.Task]:
    """Return the user's own tasks (`paths`), those of the paper, or the embedded ones."""
    if config.paths:
        domains = examples.domains_of(config, "train")
        return {name: tasks.Task.from_domain(domain) for name, domain in domains.items()}
    if config.tasks and set(config.tasks) <= set(classification.NAMES):
        options = {"spelling": config.get("choices", "corrected"), "seed": config.division}
        return {name: classification.task(name, **options) for name in config.tasks}
    embedded = tasks.embedded(config.division)
    if unknown := [name for name in config.tasks if name not in embedded]:
        known = ", ".join((*embedded, *classification.NAMES))
        raise ValueError(f"config.tasks: {unknown[0]} is not one of {known}")
    return {name: embedded[name] for name in config.tasks or embedded}


def _main_runs(study: Study) -> Iterator[Run]:
    for task in study.tasks:
        for variant, setting in study.variants().items():
            for seed in study.config.seeds:
                yield Run(task, variant, seed, setting)


def _factor_runs(study: Study) -> Iterator[Run]:
    for task in study.config.factors.tasks:
        for name in study.config.factors.changes:
            for seed in study.config.factors.seeds:
                yield Run(task, name, seed, _changed(study.config, name))


def _changed(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """Return the recipe of FT-Proj with the settings of a factor."""
    setting = ml_collections.ConfigDict(config.proj.to_dict()).lock()
    try:
        setting.update(config.factors.changes[name])
    except (KeyError, TypeError) as error:  # of a name, or a type, that FT-Proj's setting lacks
        raise ValueError(f"config.factors.changes.{name}: {error}") from error
    return setting


def match(study: Study) -> dict[str, dict[str, np.ndarray]]:
    """Return CLIP's zero-shot answers, {CLIP: int32[1, N]} by task; {} without a CLIP."""
    if not study.config.clip:
        return {task: {} for task in study.tasks}

    def make() -> dict[str, np.ndarray]:
        model, processor = clip.load(study.config.clip)
        return {
            f"predicted/{name}": zero_shot.zero_shot(
                model, processor, (e.image for e in study.examples(name, "test")), task.classes
            )
            for name, task in study.tasks.items()
        }

    arrays = study.workdir.arrays("clip", make)
    return {task: {CLIP: arrays[f"predicted/{task}"][None]} for task in study.tasks}


def _answers(study: Study, outputs: Outputs, task: str) -> dict[str, np.ndarray]:
    """Return int[R, N] by variant, the answers of the models of the main tables."""
    seeds = study.config.seeds
    return {v: stack_seeds(outputs, task, v, seeds, "predicted") for v in study.variants()}


def _describe(study: Study, name: str) -> dict[str, Any]:
    task = study.tasks[name]
    return {
        "topic": task.topic,
        "classes": list(task.classes),
        **{split: study.count(name, split) for split in tasks.SPLITS},
    }


def _answer_rows(study: Study, name: str, task: projection.Task) -> list[dict[str, Any]]:
    """Return Table 1: the uniform baseline, CLIP if there is one, and the model of each variant."""
    random = projection.uniform(len(task.truth), task.classes, len(study.config.seeds))
    rows = projection.table(
        task.truth, {"Random": random, **task.predicted}, task.classes, over=ORIGINAL
    )
    return [{"task": name, **row} for row in rows]


def _probe_rows(name: str, task: projection.Task) -> Iterator[dict[str, Any]]:
    """Yield the rows of Tables 2 and 3."""
    for kind, predicted in task.probed.items():
        for row in projection.table(task.truth, predicted, task.classes, over=ORIGINAL):
            yield {"task": name, "probe": kind, **row}
