"""Steering, measured: the effect of an edit on the answers that it should change, and on others.

The answers of a batch are measured under edits of any strength, in one sweep:

    galaxies = processor(pictures, [question] * 8, ["a document"] * 8)     # the answer to steer to
    others = processor(scans, questions, right_answers)
    curve = steering.curve(model, direction, [0, 1, 2], {"effect": galaxies, "damage": others})
    curve.answers["effect"].log_probability     # an interval for each draw and strength
    curve.answers["damage"].perplexity, curve.answers["damage"].accuracy

The direction is compared with random ones of equal norm. A strength of 0 is the unedited model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from mllm_jax import sites as S
from mllm_jax.analysis import intervals
from mllm_jax.analysis.directions import Direction
from mllm_jax.batch import Batch
from mllm_jax.interventions.captures import keep
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.tap import Taps
from mllm_jax.passes.run import Out, run
from mllm_jax.passes.sweep import sweep
from mllm_jax.sharding import mesh
from mllm_jax.training.losses import answer_log_probs, require_answers
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Answers:
    """The likelihoods of the answers of N examples, under each of several edits.

    Attributes:
      log_likelihood: The log-likelihood of each answer, float32[..., N], in nats.
      chosen: Whether greedy decoding gives the answer: each of its tokens is the most probable one
        after those before it, bool[..., N].
      tokens: The number of tokens of each answer, int32[N].
    """

    log_likelihood: Float[np.ndarray, "... N"]
    chosen: Bool[np.ndarray, "... N"]
    tokens: Int[np.ndarray, " N"]

    @property
    def log_probability(self) -> intervals.Interval[np.ndarray]:
        """The mean log-likelihood of an answer, with its interval over examples."""
        return intervals.mean(np.moveaxis(self.log_likelihood, -1, 0))

    @property
    def accuracy(self) -> intervals.Interval[np.ndarray]:
        """The share of the answers that greedy decoding gives, with its interval over examples."""
        return intervals.mean(np.moveaxis(self.chosen, -1, 0))

    @property
    def perplexity(self) -> intervals.Interval[np.ndarray]:
        """The perplexity per token of an answer, with its interval over examples."""
        losses = -np.moveaxis(self.log_likelihood, -1, 0)
        tokens = self.tokens.reshape(-1, *(1,) * (losses.ndim - 1))
        return intervals.Interval(*map(np.exp, intervals.ratio(losses, tokens)))


@dataclasses.dataclass(frozen=True)
class Curve:
    """The answers of several batches by strength, for a direction and random ones of equal norm.

    Attributes:
      strengths: The strengths, float64[n].
      answers: The answers by the name of the batch; their arrays are [1 + draws, n, N], with the
        direction itself first and then each random one.
    """

    strengths: Float[np.ndarray, " n"]
    answers: dict[str, Answers]


def curve(
    model: Model,
    direction: Direction,
    strengths: Sequence[float],
    batches: Mapping[str, Batch],
    *,
    draws: int = 3,
    seed: int = 0,
) -> Curve:
    """Measure the answers of batches along a direction and along random ones of equal norm.

    Args:
      model: See `run`.
      direction: The direction.
      strengths: The strengths; 0 is the unedited model.
      batches: Batches with answers, by name: those that the direction should make likely, and those
        that it should leave likely.
      draws: The number of random directions.
      seed: The seed of the random directions.

    Raises:
      ValueError: A batch has no answers, or the direction does not fit the model.
    """
    every = [direction, *(direction.random_like(seed + draw) for draw in range(draws))]
    lanes = [one.edit(strength) for one in every for strength in strengths]
    shape = len(every), len(strengths)

    def measure_batch(batch: Batch) -> Answers:
        found = measure(model, batch, lanes)
        likelihood, chosen = (
            rows.reshape(*shape, -1) for rows in (found.log_likelihood, found.chosen)
        )
        return Answers(likelihood, chosen, found.tokens)

    answers = {name: measure_batch(batch) for name, batch in batches.items()}
    return Curve(np.asarray(strengths, np.float64), answers)


def measure(model: Model, batch: Batch, edits: Sequence[Edits]) -> Answers:
    """Measure the answers of a batch under each of some edits, in one sweep.

    Args:
      model: See `run`.
      batch: A batch with answers: processor(images, prompts, answers). Rows without an answer are
        left out.
      edits: See `sweep`; edits of the logits are not allowed.

    Returns:
      The answers, whose arrays are [R, N].

    Raises:
      ValueError: The batch has no answers, or an edit does not fit.
    """
    labels = require_answers(batch)
    metric = jax.tree_util.Partial(_answers, model=model, ids=batch.ids, labels=labels)
    likelihood, chosen = sweep(metric, model, batch, edits, _STATES, logits="none")
    tokens = (np.asarray(labels) >= 0).sum(-1)
    rows = tokens > 0
    return Answers(likelihood[:, rows], chosen[:, rows], tokens[rows].astype(np.int32))


def log_likelihood(model: Model, batch: Batch, edits: Edits | None = None) -> Float[Array, " B"]:
    """Return the log-likelihood of the answer of each row under edits; 0 for rows without one.

    It is a pure function, so that a loss for `training.edits.learn` can use it.
    """
    labels = require_answers(batch)
    out = run(model, batch, edits, _STATES, logits="none")
    with mesh.use_mesh_of(model):
        return _answers(out, model, batch.ids, labels)[0]


_STATES = {"states": keep(S.lm.norm)}


def _answers(
    out: Out, model: Model, ids: Int[AnyArray, "B T"], labels: Int[AnyArray, "B A"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Return the log-likelihood of each answer, and whether greedy decoding gives it."""
    log_probs, chosen = answer_log_probs(model, out["states"], ids, labels, Taps())
    return log_probs.sum(-1), chosen.all(-1)
