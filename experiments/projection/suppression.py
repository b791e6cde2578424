"""Suppress one of two classes with AurA's gains (Suau et al. 2024), and with controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

import mllm_jax as mj
from experiments import context
from experiments.projection.context import Study
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import domain_neurons, scores, selectors
from mllm_jax.analysis.projection import ORIGINAL
from mllm_jax.arguments import require_whole
from mllm_jax.data import batching, tasks
from mllm_jax.evaluation import answers
from mllm_jax.interventions.edits import Edits


def check(study: Study) -> None:
    """Refuse classes that the task lacks, and more experts than neurons, before anything trains."""
    setting, lm = study.config.suppress, study.model.config.lm
    task = study.tasks[setting.task]
    if len(setting.classes) != 2:
        raise ValueError(
            f"config.suppress.classes={tuple(setting.classes)}: name two classes, of which the "
            "first is suppressed"
        )
    for label in setting.classes:
        context.require_choice("config.suppress.classes", label, task.classes)
        for split in ("train", "test"):
            if task.classes.index(label) not in study.ids(task.name, split):
                raise ValueError(
                    f"config.suppress.classes: none of the {split} pictures of {task.name} is "
                    f"{label!r}; raise config.{split}_per_task, or name another class"
                )
    require_whole("config.suppress.experts", setting.experts, 0, lm.layers * lm.mlp)


def suppress(study: Study) -> Iterator[dict[str, Any]]:
    """Suppress one of two classes: by AurA's gains, by ablating the best experts, and by controls.

    Yields:
      Rows like those of the ablation, with the recall of each class in `recall`.
    """
    setting = study.config.suppress
    if not setting.task:
        return
    task = dataclasses.replace(study.tasks[setting.task], classes=tuple(setting.classes))
    train, test = (_two_classes(study, task, split) for split in ("train", "test"))
    truth_train, truth = (
        np.array([task.classes.index(e.label) for e, _ in questions.pairs])
        for questions in (train, test)
    )
    responses = study.workdir.arrays("suppress/responses", lambda: _responses(study.model, train))
    edits = _edits(responses["mean"], truth_train, task.classes[0], setting.experts)
    clean = None
    for number, (name, (neurons, edit)) in enumerate(edits.items()):

        def make(edit=edit) -> dict[str, np.ndarray]:
            likelihood = answers.score_classes(study.model, test, edit)
            return {"predicted": likelihood.argmax(-1).astype(np.int32)}

        predicted = study.workdir.arrays(f"suppress/{number}", make)["predicted"]
        value = scores.f1(truth, predicted[None], len(task.classes))
        clean = clean or value
        yield {
            "task": f"{task.name}: {' or '.join(task.classes)}", "variant": ORIGINAL,
            "ablated": name, "neurons": neurons, "f1": value.row(),
            "change": scores.change(value, clean),
            "recall": {
                label: float((predicted == c)[truth == c].mean())
                for c, label in enumerate(task.classes)
            },
        }  # fmt: skip


def _edits(
    responses: np.ndarray, truth: np.ndarray, suppressed: str, count: int
) -> dict[str, tuple[int, Edits]]:
    """Return the edits to compare, each with the number of its neurons.

    Args:
      responses: float32[N, L, F], the mean activations of each picture.
      truth: int[N], the classes of the pictures; class 0 is suppressed.
      suppressed: The name of class 0.
      count: The number of experts to ablate.
    """
    expertise = selectors.auroc(responses, truth)
    gains = selectors.aura_gain(expertise[0])
    experts = selectors.top(expertise, count)[0]
    shuffled = np.random.default_rng(0).permuted(gains, axis=-1)
    random = domain_neurons.random_mask_like(experts, 0)
    act = S.lm.mlp.act
    return {
        "nothing": (0, Edits()),
        f"AurA against {suppressed}": (int((gains < 1).sum()), mj.scale(act, gains)),
        "AurA's gains shuffled": (int((shuffled < 1).sum()), mj.scale(act, shuffled)),
        f"experts on {suppressed}": (int(experts.sum()), mj.ablate(act[experts])),
        "random neurons": (int(random.sum()), mj.ablate(act[random])),
    }


def _two_classes(study: Study, task: tasks.Task, split: str) -> batching.QuestionBatches:
    """Return the questions of the pictures of the two classes, which name only these."""
    examples = study.examples(task.name, split)
    at = [i for i, example in enumerate(examples) if example.label in task.classes]
    options = {"wording": study.config.wording, "seed": study.config.seeds[0]}
    pairs = [(examples[i], answers.question(task, examples[i], **options)) for i in at]
    length = batching.row_length(study.processor, pairs)
    features = study.features(task.name, split)[at]
    return batching.QuestionBatches(study.processor, pairs, study.config.rows, length, features)


def _responses(model: Any, questions: batching.QuestionBatches) -> dict[str, np.ndarray]:
    """Return `mean`, float32[N, L, F]: a neuron's mean over the image tokens of each picture."""
    capture = {"mean": mj.mean(S.lm.mlp.act, where=tok.image)}
    parts = [
        np.asarray(mj.run(model, questions[i], None, capture, logits="none")["mean"])
        for i in range(len(questions))
    ]
    rows = [part.swapaxes(0, 1)[: len(questions.rows(i))] for i, part in enumerate(parts)]
    return {"mean": np.concatenate(rows)}
