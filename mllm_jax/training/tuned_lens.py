"""Tuned lens: the logit lens after a trained affine map for each layer.

The logit lens applies the head to an earlier state, which is written in other directions; a tuned
lens first maps the state, x + x W + b, trained to minimise the KL divergence from the model's own
distribution (Belrose et al. 2023, "Eliciting latent predictions"). The last layer has no map,
because its lens is the model's own distribution.

    captures = {"x": mj.keep(S.lm.resid_post[[5, 15, 29]], where=tok.image)}   # the last one last
    source = mj.collect(captures, model, batches, folder)["x"]
    chunks = (vectors.value for vectors in source.shuffled(64, seed=0, drop_last=True))
    fitted = tuned_lens.fit(model, chunks)
    lenses.compare(model, source[:500].value, fitted.lens).kl              # float32[L, n]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mllm_jax.interventions.model import Model
from mllm_jax.numerics import precision
from mllm_jax.training.lenses import AffineLens, apply_map, kl
from mllm_jax.typing import AnyArray, Array, Float


class Fitted(NamedTuple):
    """A trained lens.

    Attributes:
      lens: The maps.
      losses: The mean KL of each layer at each step, float32[steps, L - 1].
    """

    lens: AffineLens
    losses: Float[np.ndarray, "steps L_1"]


def fit(
    model: Model, chunks: Iterable[Float[AnyArray, "n L D"]], *, rate: float = 1e-3,
    weight_decay: float = 0.0,
) -> Fitted:  # fmt: skip
    """Train a tuned lens with AdamW, one step for each chunk of states.

    Chunks should have equally many tokens, in random order.

    Args:
      model: The model, whose norm and head are not changed.
      chunks: States of `lm.resid_post` at some layers, of which the last is the model's last.
      rate: The learning rate.
      weight_decay: See `optax.adamw`; it draws the maps towards the logit lens.

    Raises:
      ValueError: There is no chunk, a chunk has only one layer, or a loss is not finite.
    """
    optimiser = optax.adamw(rate, weight_decay=weight_decay)
    lens, state, losses = None, None, []
    for chunk in chunks:
        if chunk.ndim != 3 or chunk.shape[1] < 2:
            raise ValueError(
                f"a chunk of states is {chunk.shape}, expected [n, L, D] of two or more layers, "
                "ending with the model's last"
            )
        if lens is None:
            lens = AffineLens.identity(*chunk.shape[1:])
            state = optimiser.init(lens)
        lens, state, loss = _step(model, lens, state, jnp.asarray(chunk), rate, weight_decay)
        losses.append(np.asarray(loss))
        if not np.isfinite(losses[-1]).all():
            raise ValueError(f"the loss of step {len(losses) - 1} is not finite: lower rate={rate}")
    if lens is None:
        raise ValueError("there is no chunk of states to train on")
    return Fitted(lens, np.stack(losses))


@jax.jit
def _step(model: Model, lens: AffineLens, state, states: Float[Array, "n L D"], rate, weight_decay):
    own = jax.nn.log_softmax(model.lm.lens(states[:, -1]))

    def of_layer(inputs):
        weight, bias, x = inputs

        def loss(parameters):
            mapped = apply_map(precision.at_least_float32(x), *parameters)
            return kl(own, jax.nn.log_softmax(model.lm.lens(mapped))).mean()

        return jax.value_and_grad(loss)((weight, bias))

    # One layer at a time: the logits of one are as large as all the states.
    each = lens.weight, lens.bias, jnp.moveaxis(states[:, :-1], 1, 0)
    losses, gradients = jax.lax.map(of_layer, each)
    optimiser = optax.adamw(rate, weight_decay=weight_decay)
    updates, state = optimiser.update(AffineLens(*gradients), state, lens)
    return optax.apply_updates(lens, updates), state, losses
