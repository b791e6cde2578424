"""The projector: from vision features to tokens of the language model (Liu et al. 2023)."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import layers
from mllm_jax.sites import projector as S
from mllm_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """An MLP projector.

    Attributes:
      in_width: E. out_width: D. depth: linear maps: 1 is linear, N is mlpNx_gelu.
      act: between the maps. bias: of the maps.
      fold: side of the square of patches that becomes one token; 1 keeps every patch.
    """

    in_width: int
    out_width: int
    depth: int = 2
    act: str = "gelu"
    bias: bool = True
    fold: int = 1


class Projector(nnx.Module):
    """linear -> act -> linear ..., on patches folded fold x fold."""

    def __init__(self, config: ProjectorConfig, *, rngs: nnx.Rngs):
        widths = [config.in_width * config.fold**2] + [config.out_width] * config.depth
        self.config = config
        self.linears = nnx.List(
            layers.Linear(n, m, use_bias=config.bias, rngs=rngs)
            for n, m in itertools.pairwise(widths)
        )

    def __call__(self, x: Float[Array, "I P E"], tap) -> Float[Array, "I P D"]:
        """Project the features of a picture into the width of the language model."""
        x = fold(x, self.config.fold)
        act = layers.ACTIVATIONS[self.config.act]
        x = tap.loop(lambda linear, x, tap: tap(S.act, act(linear(x))), self.linears[:-1], x)
        return tap(S.out, self.linears[-1](x))


def fold(x: Float[Array, "I P E"], side: int) -> Float[Array, "I p e"]:
    """Concatenate side x side neighbouring patches in one token; p = P / side^2."""
    if side == 1:
        return x
    I, P, E = x.shape
    grid = round(P**0.5)
    x = x.reshape(I, grid // side, side, grid // side, side, E).swapaxes(2, 3)
    return jnp.reshape(x, (I, P // side**2, side**2 * E))
