"""The projector: from vision features to tokens of the language model (Liu et al. 2023).

A square of patches may become one token, before a stack of linear maps with activations between
them. All families have this form; `ProjectorConfig` contains the differences.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal

from flax import nnx

from mllm_jax.models import layers
from mllm_jax.sharding import mesh
from mllm_jax.sites import projector as S
from mllm_jax.typing import Array, Float

Norm = Literal["layer", "rms", "unit_offset_rms"]  # the last multiplies by 1 + its scale (Gemma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """A projector.

    Attributes:
      in_width: The input width E.
      out_width: The output width D.
      hidden_width: F, the width between the linear maps; None for D.
      depth: The number of linear maps: 1 is "linear", N is "mlpNx_gelu".
      act: The activation between the maps.
      bias: Whether the maps have a bias.
      fold: The side of the square of patches that becomes one token; 1 keeps every patch.
      fold_to: The reduction of a square: its patches are concatenated, "merged" by a linear map
        without a bias from all of them to E (Mistral 3), or averaged (Gemma 3).
      channels_first: Whether concatenated patches are ordered by channel and then by position
        (Mistral 3), instead of patch by patch.
      in_blocks: Whether patches come square by square (see `models.grids`), not row by row.
      norm: The norm before the linear maps; None if there is none.
      norm_after: Whether the norm follows the fold, instead of normalising each patch.
      eps: The epsilon of the norm.
      deepstack: K, the number of further projectors of this kind, with a norm after the fold, for
        the features of DeepStack (Qwen3-VL).
    """

    in_width: int
    out_width: int
    hidden_width: int | None = None
    depth: int = 2
    act: str = "gelu"
    bias: bool = True
    fold: int = 1
    fold_to: Literal["concatenated", "merged", "mean"] = "concatenated"
    channels_first: bool = False
    in_blocks: bool = False
    norm: Norm | None = None
    norm_after: bool = False
    eps: float = 1e-6
    deepstack: int = 0

    @classmethod
    def linear(cls, in_width: int, out_width: int) -> ProjectorConfig:
        """Return the config of PaliGemma's projector."""
        return cls(in_width=in_width, out_width=out_width, depth=1)

    @classmethod
    def pooled(cls, in_width: int, out_width: int, *, pool: int, eps: float) -> ProjectorConfig:
        """Return the config of Gemma 3's projector, which averages pool x pool patches."""
        return cls(
            in_width=in_width, out_width=out_width, depth=1, bias=False, fold=pool, fold_to="mean",
            norm="unit_offset_rms", norm_after=True, eps=eps,
        )  # fmt: skip

    @classmethod
    def shuffled(
        cls, in_width: int, out_width: int, *, fold: int = 2, act: str = "gelu"
    ) -> ProjectorConfig:
        """Return the config of InternVL's projector."""
        return cls(
            in_width=in_width, out_width=out_width, act=act, fold=fold, norm="layer",
            norm_after=True, eps=1e-5,
        )  # fmt: skip

    @classmethod
    def qwen(
        cls, in_width: int, out_width: int, *, norm: Norm, fold: int = 2, deepstack: int = 0
    ) -> ProjectorConfig:
        """Return the config of a Qwen-VL merger: an RMS norm in Qwen2.5-VL, else a layer norm."""
        return cls(
            in_width=in_width, out_width=out_width, hidden_width=in_width * fold**2, fold=fold,
            in_blocks=True, norm=norm, deepstack=deepstack,
        )  # fmt: skip

    @classmethod
    def merging(
        cls, in_width: int, out_width: int, *, eps: float, fold: int = 2, act: str = "gelu",
        bias: bool = False,
    ) -> ProjectorConfig:  # fmt: skip
        """Return the config of a projector with a patch merger; `eps` is the language model's."""
        return cls(
            in_width=in_width, out_width=out_width, act=act, bias=bias, fold=fold, fold_to="merged",
            channels_first=True, in_blocks=True, norm="rms", eps=eps,
        )  # fmt: skip

    @property
    def folded_width(self) -> int:
        """The width of a square of patches."""
        return self.in_width * (1 if self.fold_to == "mean" else self.fold**2)

    @property
    def widths(self) -> list[int]:
        """The widths before, between and after the linear maps."""
        first = self.in_width if self.fold_to == "merged" else self.folded_width
        return [first, *[self.hidden_width or self.out_width] * (self.depth - 1), self.out_width]


class Projector(nnx.Module):
    """norm -> fold -> linear -> act -> linear ...; the norm may follow the fold."""

    def __init__(self, config: ProjectorConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.norm is not None:
            width = config.folded_width if config.norm_after else config.in_width
            self.norm = _norm(config.norm, width, eps=config.eps, rngs=rngs)
        if config.fold_to == "merged":
            self.merge = layers.Linear(
                config.folded_width, config.in_width, use_bias=False, rngs=rngs
            )
        self.linears = nnx.List(
            layers.Linear(n, m, use_bias=config.bias, rngs=rngs)
            for n, m in itertools.pairwise(config.widths)
        )
        if config.deepstack:
            one = dataclasses.replace(config, deepstack=0, norm_after=True)
            self.deepstack = layers.stack(
                lambda keys: Projector(one, rngs=keys), config.deepstack, rngs
            )

    def __call__(self, x: Float[Array, "I P E"], tap) -> Float[Array, "I P D"]:
        """Return the image tokens of the language model.

        Args:
          x: The features. The features of DeepStack beside them are left to `deepstack_tokens`.
          tap: The taps of the projector.
        """
        # A mesh splits the input of the last map. If that is the only one, the compiler would split
        # all states of the tower or the Q-Former alike, and gather them before products.
        x = mesh.constrain(x[..., : self.config.in_width], ("I", None, None))
        act, x = layers.ACTIVATIONS[self.config.act], self.fold(x)
        tap_act = tap.only(S.act)
        x = tap_act.loop(lambda linear, x, tap: tap(S.act, act(linear(x))), self.linears[:-1], x)
        return tap(S.out, self.linears[-1](mesh.constrain(x, ("I", None, "F"))))

    def deepstack_tokens(self, x: Float[Array, "I P F"], tap) -> Float[Array, "K I P D"]:
        """Return the features added to the image tokens after each of the first K layers.

        Args:
          x: The features, in which K of width E follow those of the tower's last layer.
          tap: The taps of the projector.
        """
        config = self.config
        shape = (*x.shape[:-1], 1 + config.deepstack, config.in_width)
        features = x.reshape(shape).transpose(2, 0, 1, 3)

        def step(one, none, tap, x):
            return none, tap(S.deepstack, one._project(x))

        _, tokens = tap.only(S.deepstack).scan(step, self.deepstack, (), features[1:])
        return tokens

    def _project(self, x: Float[Array, "I P E"]) -> Float[Array, "I P D"]:
        act, x = layers.ACTIVATIONS[self.config.act], self.fold(x)
        for linear in self.linears[:-1]:
            x = act(linear(x))
        return self.linears[-1](x)

    def fold(self, x: Float[Array, "I P E"]) -> Float[Array, "I P E"]:
        """Return the normalised squares of patches, as the first linear map reads them."""
        config = self.config
        norm: Callable = (lambda x: x) if config.norm is None else self.norm
        x = x if config.norm_after else norm(x)
        x = fold(x, config.fold, in_blocks=config.in_blocks)
        if config.fold_to == "mean":
            x = x.reshape(*x.shape[:2], config.fold**2, config.in_width).mean(2)
        elif config.channels_first:
            x = x.reshape(*x.shape[:2], config.fold**2, config.in_width)
            x = x.swapaxes(2, 3).reshape(*x.shape[:2], config.folded_width)
        x = norm(x) if config.norm_after else x
        return self.merge(x) if config.fold_to == "merged" else x


def _norm(
    kind: Norm, width: int, *, eps: float, rngs: nnx.Rngs
) -> layers.LayerNorm | layers.RMSNorm:
    if kind == "layer":
        return layers.LayerNorm(width, eps=eps, rngs=rngs)
    return layers.RMSNorm(width, eps=eps, unit_offset=kind == "unit_offset_rms", rngs=rngs)


def fold(x: Float[Array, "I P E"], side: int, *, in_blocks: bool = False) -> Float[Array, "I p e"]:
    """Concatenate side x side neighbouring patches into one token; p = P / side^2.

    Args:
      x: The patches.
      side: The side of a square.
      in_blocks: Whether patches come square by square, not row by row of a square picture.
    """
    I, P, E = x.shape
    if side > 1 and not in_blocks:
        grid = round(P**0.5)
        x = x.reshape(I, grid // side, side, grid // side, side, E).swapaxes(2, 3)
    return x.reshape(I, P // side**2, side**2 * E)
