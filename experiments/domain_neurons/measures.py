"""Measures of the answers to the questions of a domain: as options, or as generated text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Protocol, cast

import jax
import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import context
from experiments.domain_neurons.context import Study
from mllm_jax import sites as S
from mllm_jax.analysis import official
from mllm_jax.batch import Batch
from mllm_jax.data import batching
from mllm_jax.data.vqa.questions import VqaQuestion
from mllm_jax.evaluation.metrics import datasets, lingo_judge
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import score


class Measure(Protocol):
    """A way to get and score the answers to the questions of a domain.

    The responses have the `texts` of the answers. The states are those of the prompt's tokens after
    `Study.deviation_layers`, [layers, B, T, D].

    Attributes:
      name: The name of the metric.
      chance: The expected score of a guess; None if it is not defined.
      changeable: The number of questions whose score can change.
      domain: The name of the domain.
      questions: Batches of its test questions.
    """

    name: str
    chance: float | None
    changeable: int
    domain: str
    questions: batching.QuestionBatches

    def respond(
        self, number: int, batch: Batch, edits: Edits
    ) -> tuple[dict[str, np.ndarray], jax.Array]:
        """Return the responses to a batch as arrays, and the hidden states of the pass."""

    def score(self, responses: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float64[N], the scores of all responses."""


class Options:
    """The answer is the option of the highest likelihood; see `Measure`."""

    name = "accuracy over options"

    def __init__(self, study: Study, domain: str):
        self.study, self.domain = study, domain
        self.questions = study.questions("test", domain)
        options = [question.options for _, question in self.questions.pairs]
        self.length = score.answer_length(study.processor, itertools.chain(*options))
        self.chance: float | None = float(np.mean([1 / len(choices) for choices in options]))
        self.changeable = sum(len(choices) > 1 for choices in options)

    def respond(
        self, number: int, batch: Batch, edits: Edits
    ) -> tuple[dict[str, np.ndarray], jax.Array]:
        """Return the answers of a batch, whether they are right, and the hidden states."""
        candidates = self.questions.candidates(number)
        ids = score.candidate_ids(
            self.study.processor, candidates, len(batch.ids), length=self.length
        )
        out = score.score_with(self.study.model, batch, ids, edits, _states(self.study))
        rows = len(self.questions.rows(number))
        best = np.asarray(out.values)[:rows].argmax(-1)
        texts = np.array([options[i] for options, i in zip(candidates, best, strict=True)])
        right = best == self.questions.right(number)
        return {"right": right, "texts": texts}, out.captures["states"]

    def score(self, responses: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float64[N], 1 where the answer is right."""
        return responses["right"].astype(float)


class Answers:
    """The answer is generated, and scored by the metric of the data set; see `Measure`."""

    chance: float | None = None

    def __init__(self, study: Study, domain: str):
        self.study, self.domain = study, domain
        self.questions = study.questions("test", domain)
        self.changeable = len(self.questions.pairs)
        self.options = {"compat": study.config.compat or None}
        if domain == "lingoqa":
            self.options["judge"] = lingo_judge.load(
                study.config.judge, fallback=study.config.judge_fallback
            )
        self.name = datasets.name(domain, **self.options)

    def respond(
        self, number: int, batch: Batch, edits: Edits
    ) -> tuple[dict[str, np.ndarray], jax.Array]:
        """Return the generated texts of a batch, and the hidden states of the pass."""
        model, config = self.study.model, self.study.config
        states = mj.run(model, batch, edits, _states(self.study), logits="none")["states"]
        key = jax.random.fold_in(jax.random.key(config.seed), number) if config.compat else None
        generated = mj.generate(
            model, batch, edits, max_new_tokens=config.new_tokens, stop=True, key=key,
            temperature=official.TEMPERATURE if config.compat else 0.0,
        )  # fmt: skip
        assert generated.text is not None  # the batch has a processor
        texts = generated.text[: len(self.questions.rows(number))]
        return {"texts": np.array(texts)}, states

    def score(self, responses: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float64[N], the metric of the data set."""
        questions = [cast(VqaQuestion, question) for _, question in self.questions.pairs]
        return datasets.score(self.domain, responses["texts"].tolist(), questions, **self.options)


def _states(study: Study) -> dict[str, Capture]:
    return {"states": mj.keep(S.lm.resid_post[study.deviation_layers])}


MEASURES: dict[str, type[Options] | type[Answers]] = {"options": Options, "answers": Answers}


def check_measure(config: ml_collections.ConfigDict) -> None:
    """Refuse a measure that is unknown, or not defined on the domains of the config."""
    context.require_choice("config.measure", config.measure, MEASURES)
    if config.measure == "answers":
        if not config.get("vqa"):
            raise ValueError(
                "config.measure='answers' has metrics only for MMNeuron's data sets (config.vqa); "
                "use config.measure='options' for other domains"
            )
        if "lingoqa" in (config.domains or datasets.NAMES):
            lingo_judge.load(config.judge, fallback=config.judge_fallback)
