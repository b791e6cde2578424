"""Fine-tune the model of a run, and compute all outputs that the study needs."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

import mllm_jax as mj
from experiments.modules import ablate_masks
from experiments.projection import neurons
from experiments.projection.context import DEPTH_KINDS, Arrays, Run, Study
from mllm_jax.data import batching, pooled, tasks
from mllm_jax.data import features as features_
from mllm_jax.data.domains import Example
from mllm_jax.data.embedded.questions import Question
from mllm_jax.evaluation import answers
from mllm_jax.interventions.edits import Edits
from mllm_jax.sharding import hosts
from mllm_jax.training import batches, fit, start


class Tuned:
    """The model of a run, which is fine-tuned on first access.

    Outputs on disk need no access, so a complete run is not trained again.
    """

    def __init__(self, study: Study, run: Run):
        self.study, self.run = study, run
        self.folder = study.workdir / "checkpoints" / run.name

    @property
    def model(self) -> Any:
        """The fine-tuned model."""
        return self._fitted[0]

    @property
    def losses(self) -> np.ndarray:
        """float32[steps], the loss of each step; empty for the original model."""
        return self._fitted[1]

    @functools.cached_property
    def _fitted(self) -> tuple[Any, np.ndarray]:
        study, run, setting = self.study, self.run, self.run.setting
        if setting is None:
            return study.model, np.zeros(0, np.float32)
        recipe = fit.Recipe.of(setting.recipe.to_dict())
        features = study.features(run.task, "train", setting.aspect)
        count = setting.steps * recipe.accumulate
        training = batches.AnswerBatches(
            study.processor, functools.partial(self._question, run.seed), features,
            size=setting.batch_size, count=count, length=self._length(count, len(features)),
            seed=run.seed, end=setting.end,
            sizes=features_.picture_sizes(study.model.config, self._examples),
        )  # fmt: skip
        model = self._start(features)
        save = self.folder if study.config.checkpoints else None
        chosen = None if run.neurons is None else dict.fromkeys(("up", "down"), run.neurons)
        return fit.fit(model, training, recipe, save=save, label=run.name, neurons=chosen)

    def _question(self, seed: int, row: int, epoch: int) -> Question:
        return answers.question(
            self.study.tasks[self.run.task], self._examples[row],
            wording=self._setting.wording, seed=seed, epoch=epoch,
        )  # fmt: skip

    @property
    def _setting(self) -> Any:
        return self.run.setting

    @functools.cached_property
    def _examples(self) -> list[Example]:
        return self.study.examples(self.run.task, "train")

    def _length(self, count: int, examples: int) -> int:
        """Return the length of the longest row of all seeds, which then share one program."""
        epochs = -(-count * self._setting.batch_size // examples)
        pairs = [
            (self._examples[row], self._question(seed, row, epoch))
            for seed in self.study.config.seeds
            for epoch in range(epochs)
            for row in range(examples)
        ]
        return batching.row_length(self.study.processor, pairs, answers=True)

    def _start(self, features: np.ndarray) -> Any:
        """Return the model before fine-tuning."""
        if self._setting.start == "tuned":
            return self.study.model
        model, _ = mj.load(self.study.config.model, projector="random", seed=self.run.seed)
        sample = features_.features_batch(self.study.processor, self._examples[:64], features[:64])
        return start.scale_projector(
            model, np.asarray(sample.features), features_.is_patch(model, sample)
        )

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints, once all outputs of the run are on disk."""
        hosts.barrier(f"forget {self.run.name}")
        if hosts.is_primary():
            shutil.rmtree(self.folder, ignore_errors=True)


def measure(study: Study, run: Run) -> dict[str, np.ndarray]:
    """Return all outputs of a run, by name.

    Returns:
      `losses`; `predicted`, int32[N], the answers; `after/SPLIT`, the projected features;
      `positive/MODULE/TASK` and `tokens/MODULE/TASK` (see `neurons.count`), `weights/lm` (see
      `neurons.weight_change`); and of the first seed `image/SPLIT` and `last/SPLIT` (see
      `layers`) and `off/NAME`, answers with neurons ablated.
    """
    tuned, task = Tuned(study, run), study.tasks[run.task]

    def step(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return study.workdir.arrays(f"runs/{run.name}/{name}", make)

    outputs = step("losses", lambda: {"losses": tuned.losses})
    outputs |= step("answers", lambda: {"predicted": answer(study, tuned.model, task, run.seed)})
    outputs |= step("projected", lambda: projected(study, tuned.model, run.task))
    main, first = run.variant in study.variants(), run.seed == study.config.seeds[0]
    deep = main and first and run.variant in study.config.depth
    if deep:
        outputs |= layers(study, tuned)
    # The original model is the same for every seed.
    counted = main and (first or run.setting is not None)
    if counted and study.config.neurons.pictures:
        outputs |= step("neurons", lambda: neurons.count(study, tuned.model))
        if neurons.trains_lm(run):
            outputs |= step("weights", lambda: neurons.weight_change(study.model, tuned.model))
    if deep and study.config.neurons.pictures:
        own = neurons.domain_masks(study, outputs, run.task)
        changed = {"changed": neurons.most_changed(outputs, own)} if neurons.trains_lm(run) else {}
        named = {"own": own, **neurons.random_controls(study, own), **changed}
        for name, masks in named.items():
            outputs |= step(
                f"off-{name}", functools.partial(_answer_ablated, study, tuned, name, masks)
            )
    tuned.remove_checkpoints()
    return outputs


def _answer_ablated(study: Study, tuned: Tuned, name: str, masks: Arrays) -> dict[str, np.ndarray]:
    """Return the answers with the neurons of masks ablated, as `off/NAME`."""
    run, edits = tuned.run, ablate_masks(masks)
    task = study.tasks[run.task]
    return {f"off/{name}": answer(study, tuned.model, task, run.seed, edits)}


def answer(
    study: Study, model: Any, task: tasks.Task, seed: int, edits: Edits | None = None
) -> np.ndarray:
    """Return int32[N], the class that the model gives each test picture; -1 for none."""
    questions = study.questions(task, "test", seed)
    if study.config.answers == "free":
        texts = answers.generate_answers(model, questions, edits)
        return answers.parse_answers(texts, task.classes)
    return answers.score_classes(model, questions, edits).argmax(-1).astype(np.int32)


def projected(study: Study, model: Any, task: str) -> dict[str, np.ndarray]:
    """Return float32[N, D] by split, the projected features, mean over a picture's tokens."""
    return {
        f"after/{split}": study.mean_features(model, task, split)["projector"]
        for split in tasks.SPLITS
    }


def layers(study: Study, tuned: Tuned) -> dict[str, np.ndarray]:
    """Return float32[N, L, D] by kind of token and split, the output of each layer of the LM.

    The kinds are the mean over the image tokens, and the last token. The files are memory-mapped.
    """
    run = tuned.run
    folder = study.workdir / "steps" / "runs" / run.name

    def make() -> bool:
        for split in tasks.SPLITS:
            questions = study.neutral_questions(run.task, split, study.count(run.task, split))
            pooled.pooled_features(
                tuned.model, study.processor, [e for e, _ in questions.pairs],
                [q.prompt for _, q in questions.pairs], folder / split,
                features=questions.features, batch_size=questions.size, length=questions.length,
            )  # fmt: skip
        return True

    study.workdir.json(f"runs/{run.name}/layers", make)
    return {
        f"{kind}/{split}": np.load(folder / split / f"lm.{kind}.npy", mmap_mode="r")
        for kind in DEPTH_KINDS
        for split in tasks.SPLITS
    }
