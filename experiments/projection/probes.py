"""Probe the classes of pictures before and after projectors, and after every layer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.projection.context import (
    DEPTH_KINDS,
    Arrays,
    Outputs,
    Study,
    stack_seeds,
)
from mllm_jax.analysis import probe, scores
from mllm_jax.analysis.projection import BEFORE, PROJ
from mllm_jax.data import tasks

NAMES = ("paper", "linear", "matched", "unseen")
FOLDS = 4  # of the test pictures, for the unseen probe


def names(study: Study, task: str) -> list[str]:
    """Return the probes of a task; the unseen one if some class has two test pictures."""
    several = folds(study.ids(task, "test")).any()
    return [name for name in NAMES if name != "unseen" or several]


def read(
    study: Study, outputs: Outputs, task: str, name: str, variants: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Return int32[R, N] by variant: the class that a probe predicts for each picture.

    Args:
      study: The study.
      outputs: The outputs of all runs.
      task: The name of the task.
      name: The probe: "paper", "linear", "matched" or "unseen".
      variants: The runs whose projector is read; by default those of the main tables, and
        "before", the features before the projection.
    """
    named, seeds = variants or tuple(study.variants()), study.config.seeds
    if variants:
        seeds = study.config.factors.seeds
    after = outputs[task, named[0], seeds[0]]["after/train"]
    stacked = 1 + study.model.config.projector.deepstack
    width = study.features(task, "train").shape[-1] // stacked
    kinds = _probes(study.config, width, after.shape[-1])[name]

    classes = len(study.tasks[task].classes)

    def predict(kind: probe.Probe, features: Arrays, seed: int) -> np.ndarray:
        train, held, test = (probe.Part(features[s], study.ids(task, s)) for s in tasks.SPLITS)
        if name == "unseen":
            return _predict_unseen(kind, held, test, classes, seed)
        fitted = probe.fit(kind, train, held, test, classes=classes, seeds=(seed,))
        return np.asarray(fitted.predicted)

    def make() -> dict[str, np.ndarray]:
        predicted = {}
        if not variants:
            before: dict[str, np.ndarray] = {
                s: study.mean_features(study.model, task, s)["vision"] for s in tasks.SPLITS
            }
            predicted[BEFORE] = np.concatenate([predict(kinds[0], before, seed) for seed in seeds])
        by_seed = []
        for seed in seeds:  # all variants at once
            features: dict[str, np.ndarray] = {
                s: np.stack([outputs[task, v, seed][f"after/{s}"] for v in named])
                for s in tasks.SPLITS
            }
            by_seed.append(predict(kinds[1], features, seed)[:, 0])
        return predicted | dict(zip(named, np.stack(by_seed, 1), strict=True))

    return study.workdir.arrays(f"probes/{task}-{name}{'-factors' if variants else ''}", make)


def folds(labels: np.ndarray) -> np.ndarray:
    """Return int[N], the fold of each picture; the pictures of a class are spread over folds."""
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
        of_class = labels == label
        rank[of_class] = np.arange(of_class.sum())
    return rank % FOLDS


def _predict_unseen(
    kind: probe.Probe, held: probe.Part, test: probe.Part, classes: int, seed: int
) -> np.ndarray:
    """Classify test pictures by a probe trained on other test pictures, unseen in fine-tuning.

    Args:
      kind: The probe.
      held: The pictures for early stopping.
      test: The test pictures, of features [N, D] or [sites, N, D].
      classes: Number of classes.
      seed: Seed of the probe.

    Returns:
      int32[1, N] or int32[sites, 1, N].
    """
    fold = folds(test.labels)
    predicted = np.zeros((*test.features.shape[:-2], 1, len(fold)), np.int32)
    for number in np.unique(fold):
        read = fold == number
        others, own = (
            probe.Part(test.features[..., chosen, :], test.labels[chosen])
            for chosen in (~read, read)
        )
        fitted = probe.fit(kind, others, held, own, classes=classes, seeds=(seed,))
        predicted[..., read] = np.asarray(fitted.predicted)
    return predicted


def _probes(
    config: ml_collections.ConfigDict, before: int, after: int
) -> dict[str, tuple[probe.Probe, probe.Probe]]:
    """Return the probes before and after the projection, by name.

    Args:
      config: The settings of the study.
      before: The width of the features before the projection.
      after: Their width after it.
    """
    stopping = {"epochs": config.probe.epochs, "patience": config.probe.patience}
    paper = {**stopping, "rate": config.probe.rate, "batch": config.probe.batch}
    matched = probe.matched(before, after)
    return {
        "paper": (
            dataclasses.replace(probe.BEFORE, **paper), dataclasses.replace(probe.AFTER, **paper),
        ),
        "linear": (dataclasses.replace(probe.LINEAR, **stopping),) * 2,
        "unseen": (dataclasses.replace(probe.LINEAR, **stopping),) * 2,
        "matched": (dataclasses.replace(matched, **stopping),) * 2,
    }  # fmt: skip


def depth(study: Study, outputs: Outputs, task: str) -> Iterator[dict[str, Any]]:
    """Yield the F1 of a linear probe after each layer."""
    truth, classes = study.ids(task, "test"), len(study.tasks[task].classes)
    stopping = {"epochs": study.config.probe.epochs, "patience": study.config.probe.patience}
    for variant, kind in itertools.product(study.config.depth, DEPTH_KINDS):
        arrays = outputs[task, variant, study.config.seeds[0]]

        def make(arrays=arrays, kind=kind) -> dict[str, np.ndarray]:
            parts = [
                probe.Part(arrays[f"{kind}/{s}"].swapaxes(0, 1), study.ids(task, s))
                for s in tasks.SPLITS
            ]
            linear = dataclasses.replace(probe.LINEAR, **stopping)
            fitted = probe.fit(linear, *parts, classes=classes, seeds=tuple(study.config.seeds))
            return {"predicted": np.asarray(fitted.predicted)}

        by_layer = study.workdir.arrays(f"probes/{task}-{variant}-{kind}", make)["predicted"]
        for layer, predicted in enumerate(by_layer):
            value = scores.f1(truth, predicted, classes).row()
            yield {"task": task, "variant": variant, "tokens": kind, "layer": layer, **value}


def factors(study: Study, outputs: Outputs, task: str) -> Iterator[dict[str, Any]]:
    """Yield the effect of each changed setting of FT-Proj, against the unchanged recipe."""
    seeds, changes = study.config.factors.seeds, study.config.factors.changes
    truth, classes = study.ids(task, "test"), len(study.tasks[task].classes)
    recipes = (PROJ, *changes)
    probed = read(study, outputs, task, "paper", recipes)
    by_name = {
        name: scores.f1(truth, stack_seeds(outputs, task, name, seeds, "predicted"), classes)
        for name in recipes
    }
    for name in recipes:
        yield {
            "task": task,
            "recipe": name,
            "factor": "" if name == PROJ else name,
            "setting": "" if name == PROJ else _format(changes[name].to_dict()),
            "f1": by_name[name].row(),
            "change": None if name == PROJ else scores.change(by_name[name], by_name[PROJ]),
            "probe": scores.f1(truth, probed[name], classes).row(),
        }


def _format(settings: Mapping[str, Any]) -> str:
    """Return {"recipe": {"rate": 0.1}, "end": False} as "end False, rate 0.1"."""
    flat = {k: v for k, v in settings.items() if not isinstance(v, Mapping)}
    for value in settings.values():
        flat |= value if isinstance(value, Mapping) else {}
    return ", ".join(f"{name} {value}" for name, value in flat.items())
