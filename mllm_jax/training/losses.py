"""The loss: next-token likelihood of the answer, logits at label positions only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mllm_jax.interventions.tap import Taps
from mllm_jax.sharding import collectives


def answer_nll(model, batch, *, remat: bool = False) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the answer tokens, in nats: its sum float32[B], and their number.

    Verma et al. 2024, section 2: the likelihood of the label given picture and question.

    Args:
      batch: with answers.
      remat: compute a layer's tensors again in the backward pass.

    Raises:
      ValueError: the batch has no answers.
    """
    if batch.labels is None:
        raise ValueError(
            "this batch has no answers to learn: make it with processor(images, prompts, "
            "answers=[...])"
        )
    taps = Taps(remat=remat)
    x, _ = model(batch, taps)
    labels = jnp.asarray(batch.labels)
    real = labels >= 0
    before = jnp.maximum(labels - 1, 0)  # a token is predicted where the one before it stands
    states = jnp.take_along_axis(x, before[..., None], 1)
    wanted = jnp.take_along_axis(jnp.asarray(batch.ids), jnp.maximum(labels, 0), 1)
    log_probs = jax.nn.log_softmax(model.logits(states, taps))
    said = collectives.take_along_vocabulary(log_probs, wanted)
    return -jnp.where(real, said, 0).sum(-1), real.sum(-1)
