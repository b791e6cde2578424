"""The context of the projection study: its tasks, its runs and their questions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments import context
from mllm_jax.analysis.projection import E2E, ORIGINAL, PROJ
from mllm_jax.data import batching, pooled
from mllm_jax.data import features as features_
from mllm_jax.data import tasks as tasks_
from mllm_jax.data.domains import Example
from mllm_jax.data.embedded.questions import Question
from mllm_jax.evaluation import answers

NEUTRAL_QUESTION = "What is shown in the picture?"  # for passes that must not name a class
DEPTH_KINDS = ("image", "last")
Arrays = Mapping[str, np.ndarray]
Outputs = Mapping[tuple[str, str, int], Arrays]  # of each run, by task, variant and seed


@dataclasses.dataclass(frozen=True)
class Run:
    """One model of the study.

    Attributes:
      task: The name of the task.
      variant: Original, FT-Proj, FT-E2E, or the name of a recipe of the factors.
      seed: The seed of its training and of the order of the classes in its prompts.
      setting: The settings of its fine-tuning; None for the original model.
      neurons: bool[L, F], the neurons of the language model that are trained; None for all weights.
    """

    task: str
    variant: str
    seed: int
    setting: ml_collections.ConfigDict | None = None
    neurons: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.task}/{self.variant}-{self.seed}"

    @property
    def key(self) -> tuple[str, str, int]:
        """Its key in `Outputs`."""
        return self.task, self.variant, self.seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(context.Context):
    """The inputs of every step of the study.

    Attributes:
      tasks: The classification tasks, by name.
    """

    tasks: dict[str, tasks_.Task]

    def count(self, task: str, split: str) -> int:
        """Return the number of pictures of a split in use: the first ones, as classes alternate."""
        return min(getattr(self.config, f"{split}_per_task"), len(self.tasks[task][split]))

    def examples(self, task: str, split: str) -> list[Example]:
        """Return the pictures of a split that are used, read from disk."""
        return [self.tasks[task][split][i] for i in range(self.count(task, split))]

    def content(self) -> dict[str, list[Any]]:
        """Return the topic, the classes and the fingerprints of the pictures, by task."""
        return {
            name: [task.topic, task.classes]
            + [context.content(self.examples(name, split)) for split in tasks_.SPLITS]
            for name, task in self.tasks.items()
        }

    def ids(self, task: str, split: str) -> np.ndarray:
        """Return int32[N], the classes of the pictures of a split."""
        return self.tasks[task].ids(split)[: self.count(task, split)]

    def features(self, task: str, split: str, aspect: str | None = None) -> np.ndarray:
        """Return float32[N, P, E], the features of the vision tower, which are computed once.

        Args:
          task: The name of the task.
          split: The split of its pictures.
          aspect: How pictures are made square, if the model reads only squares; by default
            `config.aspect`.
        """
        aspect = aspect or self.config.aspect
        processor = copy.copy(self.processor)
        if not self.model.config.depends_on_size:  # else the shape of a picture is kept
            processor.image_aspect_ratio = aspect
        path = self.workdir / "features" / f"{task}-{split}-{aspect}.npy"
        return features_.vision_features(
            self.model, processor, self.examples(task, split), path, label=f"features, {task}"
        )

    def mean_features(self, model: Any, task: str, split: str) -> dict[str, np.ndarray]:
        """Return each picture's mean features before and after the projector of a model.

        Returns:
          `vision`, float32[N, E], and `projector`, float32[N, D].
        """
        return pooled.projected_features(
            model, self.processor, self.examples(task, split), self.features(task, split)
        )

    def questions(self, task: tasks_.Task, split: str, seed: int) -> batching.QuestionBatches:
        """Return batches of the questions for the class of each picture."""
        pairs = [
            (e, answers.question(task, e, wording=self.config.wording, seed=seed))
            for e in self.examples(task.name, split)
        ]
        return self._batches(pairs, task.name, split, self._length(task, split))

    def neutral_questions(self, task: str, split: str, count: int) -> batching.QuestionBatches:
        """Return batches of one question that names no class, for the first pictures."""
        pairs = [
            (e, Question("shown", NEUTRAL_QUESTION, e.label, self.tasks[task].classes))
            for e in self.examples(task, split)[:count]
        ]
        return self._batches(pairs, task, split, batching.row_length(self.processor, pairs))

    def _batches(
        self, pairs: Sequence[tuple[Example, Question]], task: str, split: str, length: int
    ) -> batching.QuestionBatches:
        features = self.features(task, split)[: len(pairs)]
        size = self.config.rows
        return batching.QuestionBatches(self.processor, pairs, size, length, features)

    def _length(self, task: tasks_.Task, split: str) -> int:
        """Return the length of the longest prompt of all seeds, which then share one program."""
        return batching.row_length(
            self.processor,
            [
                (e, answers.question(task, e, wording=self.config.wording, seed=seed))
                for e in self.examples(task.name, split)
                for seed in self.config.seeds
            ],
        )

    def variants(self) -> dict[str, ml_collections.ConfigDict | None]:
        """Return the settings of the models of the main tables, by variant."""
        return {ORIGINAL: None, PROJ: self.config.proj, E2E: self.config.e2e}


def stack_seeds(
    outputs: Outputs, task: str, variant: str, seeds: Sequence[int], key: str
) -> np.ndarray:
    """Return an output of the runs of all seeds, stacked: [R, ...]."""
    return np.stack([outputs[task, variant, seed][key] for seed in seeds])
