"""Lenses that map a layer's states into the directions of the last layer, before the head.

The logit lens applies the head to a state directly (nostalgebraist 2020). `tuned_lens` trains an
affine map for each layer, and `jacobian_lens` computes a linear one. Both return an `AffineLens`,
and `compare` compares the distribution of a lens with the model's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.interventions.model import Model
from mllm_jax.numerics import precision
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AffineLens:
    """The maps x + x W + b of all layers but the last, which has none.

    Attributes:
      weight: W of each layer, float32[L - 1, D, D].
      bias: b of each layer, float32[L - 1, D].
    """

    weight: Float[AnyArray, "L_1 D D"]
    bias: Float[AnyArray, "L_1 D"]

    @classmethod
    def identity(cls, layers: int, width: int) -> AffineLens:
        """Return maps that change nothing: the logit lens.

        Args:
          layers: The number of layers L, including the last.
          width: The width D.
        """
        shape = layers - 1, width, width
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:2], jnp.float32))

    def __call__(self, states: Float[AnyArray, "n L D"]) -> Float[Array, "n L D"]:
        """Return states in the directions of the last layer, in float32 or better."""
        x = precision.at_least_float32(jnp.asarray(states))
        mapped = jax.vmap(apply_map, (1, 0, 0), 1)(x[:, :-1], self.weight, self.bias)
        return jnp.concatenate([mapped, x[:, -1:]], 1)


def apply_map(
    x: Float[Array, "n D"], weight: Float[AnyArray, "D D"], bias: Float[AnyArray, " D"]
) -> Float[Array, "n D"]:
    """Return x + x W + b."""
    return x + precision.matmul(x, jnp.asarray(weight)) + bias


def require_layers(name: str, layers: Sequence[int], count: int) -> list[int]:
    """Return the layers that a lens reads.

    Args:
      name: The name of the argument, for the error.
      layers: The layers, counted from the first.
      count: The number of layers of the model.

    Raises:
      ValueError: They are fewer than two, not in increasing order, or do not end with the last.
    """
    chosen = list(layers)
    rising = len(chosen) > 1 and chosen == sorted(set(chosen))
    if not rising or chosen[0] < 0 or chosen[-1] != count - 1:
        raise ValueError(
            f"{name}={layers}: give two or more in increasing order, ending with the model's last, "
            f"{count - 1}"
        )
    return chosen


class Comparison(NamedTuple):
    """A lens of each state compared with the model's own distribution.

    Attributes:
      kl: KL(model || lens), nats, float32[L, n].
      entropy: The entropy of the lens, nats, float32[L, n].
      agrees: Whether the most probable word is the same, bool[L, n].
      word: The most probable word of the lens, int32[L, n].
    """

    kl: Float[np.ndarray, "L n"]
    entropy: Float[np.ndarray, "L n"]
    agrees: Bool[np.ndarray, "L n"]
    word: Int[np.ndarray, "L n"]


def compare(
    model: Model, states: Float[AnyArray, "n L D"], lens: AffineLens | None = None
) -> Comparison:
    """Compare a lens with the model's own distribution.

    Args:
      model: The model.
      states: States of `lm.resid_post` at some layers, of which the last is the model's last.
      lens: A lens of these layers; None for the logit lens.
    """
    lens = lens or AffineLens.identity(*states.shape[1:])
    return Comparison(*jax.device_get(_compare(model, jnp.asarray(states), lens)))


@jax.jit
def _compare(model: Model, states: Float[Array, "n L D"], lens: AffineLens):
    own = jax.nn.log_softmax(model.lm.lens(states[:, -1]))

    def of_layer(x):
        log_probs = jax.nn.log_softmax(model.lm.lens(x))
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        word = log_probs.argmax(-1)
        return kl(own, log_probs), entropy, word == own.argmax(-1), word.astype(jnp.int32)

    mapped = lens(states).astype(states.dtype)
    return jax.lax.map(of_layer, jnp.moveaxis(mapped, 1, 0))


def kl(own: Float[Array, "n V"], other: Float[Array, "n V"]) -> Float[Array, " n"]:
    """Return KL(own || other) in nats, of distributions given as log-probabilities."""
    return (jnp.exp(own) * (own - other)).sum(-1)
