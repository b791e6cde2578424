"""Tuned lens: the logit lens after an affine map of each layer that was trained for it.

The logit lens applies the last layer's head to an earlier state, which is written in other
directions; a tuned lens first maps the state, x + x W + b, so that the words are as near as can be
to those of the model itself, by KL (Belrose et al. 2023, "Eliciting latent predictions"). The last
layer has no map: its lens is the model's own distribution.

    asked = {"x": mj.keep(S.lm.resid_post[[5, 15, 29]], where=tok.image)}      # the last one last
    source = mj.collect(asked, model, batches, folder)["x"]
    chunks = (vectors.value for vectors in source.shuffled(64, seed=0, drop_last=True))
    fitted = tuned_lens.fit(model, chunks)
    tuned_lens.compare(model, source[:500].value, fitted.lens).kl              # float32[L, n]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mllm_jax.interventions.model import Model
from mllm_jax.numerics import precision
from mllm_jax.typing import AnyArray, Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TunedLens:
    """The maps of all layers but the last.

    Attributes:
      weight: W of each layer, float32[L - 1, D, D].
      bias: b of each layer, float32[L - 1, D].
    """

    weight: Float[AnyArray, "L_1 D D"]
    bias: Float[AnyArray, "L_1 D"]

    @classmethod
    def identity(cls, layers: int, width: int) -> TunedLens:
        """Return maps that change nothing: the logit lens.

        Args:
          layers: The number of layers L, with the last.
          width: D.
        """
        shape = layers - 1, width, width
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:2], jnp.float32))

    def __call__(self, states: Float[AnyArray, "n L D"]) -> Float[Array, "n L D"]:
        """Return states in the directions of the last layer, in float32 or better."""
        x = precision.at_least_float32(jnp.asarray(states))
        mapped = jax.vmap(_map, (1, 0, 0), 1)(x[:, :-1], self.weight, self.bias)
        return jnp.concatenate([mapped, x[:, -1:]], 1)


def _map(
    x: Float[Array, "n D"], weight: Float[AnyArray, "D D"], bias: Float[AnyArray, " D"]
) -> Float[Array, "n D"]:
    return x + precision.matmul(x, jnp.asarray(weight)) + bias


class Fitted(NamedTuple):
    """A trained lens.

    Attributes:
      lens: The maps.
      losses: The mean KL of each layer at each step, float32[steps, L - 1].
    """

    lens: TunedLens
    losses: Float[np.ndarray, "steps L_1"]


class Comparison(NamedTuple):
    """The words that a lens reads in each state, against the model's own distribution.

    Attributes:
      kl: KL of the model's distribution from that of the lens, nats, float32[L, n].
      entropy: The entropy of the lens, nats, float32[L, n].
      agrees: Whether the most probable word is the same, bool[L, n].
    """

    kl: Float[np.ndarray, "L n"]
    entropy: Float[np.ndarray, "L n"]
    agrees: Bool[np.ndarray, "L n"]


def fit(
    model: Model, chunks: Iterable[Float[AnyArray, "n L D"]], *, rate: float = 1e-3,
    weight_decay: float = 0.0,
) -> Fitted:  # fmt: skip
    """Train a tuned lens with AdamW, one step for each chunk of states.

    Each chunk should be of as many tokens as the others, and tokens in random order.

    Args:
      model: The model, whose norm and head stay as they are.
      chunks: States of `lm.resid_post` at some layers, of which the last is the model's last.
      rate: The learning rate.
      weight_decay: See `optax.adamw`; it draws the maps to the logit lens.

    Raises:
      ValueError: There is no chunk, a chunk has one layer alone, or a loss is not finite.
    """
    optimiser = optax.adamw(rate, weight_decay=weight_decay)
    lens, state, losses = None, None, []
    for chunk in chunks:
        if chunk.ndim != 3 or chunk.shape[1] < 2:
            raise ValueError(
                f"a chunk of states is {chunk.shape}, expected [n, L, D] of two layers or more, "
                "the last of which is the model's last"
            )
        if lens is None:
            lens = TunedLens.identity(*chunk.shape[1:])
            state = optimiser.init(lens)
        lens, state, loss = _step(model, lens, state, jnp.asarray(chunk), rate, weight_decay)
        losses.append(np.asarray(loss))
        if not np.isfinite(losses[-1]).all():
            raise ValueError(f"the loss of step {len(losses) - 1} is not finite: lower rate={rate}")
    if lens is None:
        raise ValueError("there is no chunk of states to train on")
    return Fitted(lens, np.stack(losses))


@jax.jit
def _step(model: Model, lens: TunedLens, state, states: Float[Array, "n L D"], rate, weight_decay):
    own = jax.nn.log_softmax(model.lm.lens(states[:, -1]))

    def of_layer(inputs):
        weight, bias, x = inputs

        def loss(parameters):
            mapped = _map(precision.at_least_float32(x), *parameters)
            return _kl(own, jax.nn.log_softmax(model.lm.lens(mapped))).mean()

        return jax.value_and_grad(loss)((weight, bias))

    # One layer at a time: the logits of one are as large as all the states.
    each = lens.weight, lens.bias, jnp.moveaxis(states[:, :-1], 1, 0)
    losses, slopes = jax.lax.map(of_layer, each)
    optimiser = optax.adamw(rate, weight_decay=weight_decay)
    updates, state = optimiser.update(TunedLens(*slopes), state, lens)
    return optax.apply_updates(lens, updates), state, losses


def compare(
    model: Model, states: Float[AnyArray, "n L D"], lens: TunedLens | None = None
) -> Comparison:
    """Compare a lens with the model's own distribution.

    Args:
      model: The model.
      states: See `fit`.
      lens: A tuned lens; None for the logit lens.
    """
    lens = lens or TunedLens.identity(*states.shape[1:])
    return Comparison(*jax.device_get(_compare(model, jnp.asarray(states), lens)))


@jax.jit
def _compare(model: Model, states: Float[Array, "n L D"], lens: TunedLens):
    own = jax.nn.log_softmax(model.lm.lens(states[:, -1]))

    def of_layer(x):
        log_probs = jax.nn.log_softmax(model.lm.lens(x))
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        return _kl(own, log_probs), entropy, log_probs.argmax(-1) == own.argmax(-1)

    mapped = lens(states).astype(states.dtype)
    return jax.lax.map(of_layer, jnp.moveaxis(mapped, 1, 0))


def _kl(own: Float[Array, "n V"], other: Float[Array, "n V"]) -> Float[Array, " n"]:
    return (jnp.exp(own) * (own - other)).sum(-1)
