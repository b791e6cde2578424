"""The loss: likelihood of the answer's tokens, with logits at label positions only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.interventions.tap import Taps
from mllm_jax.sharding import collectives
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int


def answer_nll(
    model: Any, batch: Batch, *, remat: bool = False
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """Compute the negative log-likelihood of the answer tokens given picture and question.

    Verma et al. 2024, section 2.

    Args:
      model: The model.
      batch: A batch with answers.
      remat: Whether to recompute a layer's tensors in the backward pass, which saves memory.

    Returns:
      The sum float32[B] over the answer tokens of each row, in nats, and their number int32[B].

    Raises:
      ValueError: The batch has no answers.
    """
    labels = require_answers(batch)
    taps = Taps(remat=remat)
    x, _ = model(batch, taps)
    answer, _ = answer_log_probs(model, x, batch.ids, labels, taps)
    return -answer.sum(-1), (jnp.asarray(labels) >= 0).sum(-1)


def answer_log_probs(
    model: Any,
    x: Float[Array, "B T D"],
    ids: Int[AnyArray, "B T"],
    labels: Int[AnyArray, "B A"],
    taps: Taps,
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """Compute the log-probabilities of the answer tokens of a pass.

    Args:
      model: The model.
      x: The normalised states of the pass, the site lm.norm.
      ids: The token ids of the batch.
      labels: The positions of the answer tokens, see `Batch.labels`.
      taps: The taps of the pass, for the logits.

    Returns:
      The log-probability of each answer token, and whether it is the most probable one; 0 and True
      where `labels` is -1.
    """
    labels = jnp.asarray(labels)
    before = jnp.maximum(labels - 1, 0)  # a token is predicted at the position before it
    states = jnp.take_along_axis(x, before[..., None], 1)
    wanted = jnp.take_along_axis(jnp.asarray(ids), jnp.maximum(labels, 0), 1)
    log_probs, real = jax.nn.log_softmax(model.logits(states, taps)), labels >= 0
    answer = collectives.take_along_vocabulary(log_probs, wanted)
    return jnp.where(real, answer, 0), (log_probs.argmax(-1) == wanted) | ~real


def require_answers(batch: Batch) -> Int[AnyArray, "B A"]:
    """Return the labels of a batch with answers; traced labels are not checked.

    Raises:
      ValueError: The batch has no labels, or they hold no token.
    """
    labels = batch.labels
    if labels is None:
        raise ValueError(
            "this batch has no answers to learn: make it with processor(images, prompts, "
            "answers=[...])"
        )
    if not isinstance(labels, jax.core.Tracer) and not (np.asarray(labels) >= 0).any():
        raise ValueError(
            f"this batch has no answer token to learn: its labels {tuple(labels.shape)} are all -1"
        )
    return labels
