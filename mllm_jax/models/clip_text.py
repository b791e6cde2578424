"""CLIP's text transformer, and both towers with their shared space (Radford et al. 2021)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import clip, layers, vision_block
from mllm_jax.numerics import precision
from mllm_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """A CLIP text tower.

    Attributes:
      vocab: The vocabulary size V.
      positions: The largest number of tokens of a text.
      width: The width D.
      layers: The number of blocks.
      heads: The number of heads N.
      mlp: The number of neurons of an MLP, F.
      act: "quick_gelu" (OpenAI's weights) or "gelu".
      eps: The epsilon of the layer norms.
      end: The id of the token that ends a text, the first if there are several; None if that is
        the highest id of the text.
    """

    vocab: int = 49408
    positions: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    act: str = "quick_gelu"
    eps: float = 1e-5
    end: int | None = 49407

    @property
    def block(self) -> vision_block.BlockConfig:
        """The config of each block."""
        return vision_block.BlockConfig(
            width=self.width, heads=self.heads, mlp=self.mlp, act=self.act, eps=self.eps
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipPairConfig:
    """Both towers of a CLIP.

    Attributes:
      vision: The vision tower, read at its last layer, CLS included.
      text: The text tower.
      width: The width of the shared space.
    """

    vision: clip.ClipConfig
    text: ClipTextConfig
    width: int = 768


class ClipText(nnx.Module):
    """Texts to the normalised state of their last token. It offers no sites."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.words = nnx.Param(normal(rngs.params(), (config.vocab, config.width)))
        self.position = nnx.Param(normal(rngs.params(), (config.positions, config.width)))
        self.layers = layers.stack(
            lambda keys: vision_block.Block(config.block, rngs=keys), config.layers, rngs
        )
        self.norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B D"]:
        """Return the state at the end of each text.

        Args:
          ids: One text per row; padding follows its end and is not attended to.
        """
        B, T = ids.shape
        x = self.words[...][ids] + self.position[:T]
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, 1, T, T))
        x, _ = jax.lax.scan(lambda x, layer: (layer(x, _NoTap(), causal), None), x, self.layers)
        end = self.config.end
        at = (ids if end is None else ids == end).argmax(-1)
        return self.norm(x[jnp.arange(B), at])


class _NoTap:
    """Taps of a network without sites."""

    def idle(self, site, x) -> bool:
        return True

    def __call__(self, site, x):
        return x


class Clip(nnx.Module):
    """Both towers of CLIP, which map pictures and texts to unit vectors in one space."""

    def __init__(self, config: ClipPairConfig, *, rngs: nnx.Rngs):
        vision, text = config.vision, config.text
        self.config = config
        self.vision = vision.build(rngs=rngs)
        self.vision_norm = layers.LayerNorm(vision.width, eps=vision.eps, rngs=rngs)
        self.vision_out = layers.Linear(vision.width, config.width, use_bias=False, rngs=rngs)
        self.text = ClipText(text, rngs=rngs)
        self.text_out = layers.Linear(text.width, config.width, use_bias=False, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(()))

    def pictures(self, pixels: Float[Array, "I row column 3"], taps) -> Float[Array, "I joint"]:
        """Return the unit vector of each picture: its CLS token after the last layer, projected.

        Args:
          pixels: Normalised pictures of image_size x image_size pixels.
          taps: The taps of the pass; the vision tower has its sites.
        """
        x = self.vision(pixels.astype(self.vision.cls.dtype), taps.module("vision"))
        return _unit(self.vision_out(self.vision_norm(x[:, 0])))

    def texts(self, ids: Int[Array, "C T"]) -> Float[Array, "C joint"]:
        """Return the unit vectors of texts; see `ClipText`."""
        return _unit(self.text_out(self.text(ids)))

    def logits(
        self, pictures: Float[Array, "I joint"], texts: Float[Array, "C joint"]
    ) -> Float[Array, "I C"]:
        """Return the similarity of each picture and text: exp(scale) times the cosine."""
        scale = jnp.exp(precision.at_least_float32(self.scale[...]))
        return precision.matmul(scale * pictures, texts.T)


def _unit(x: Float[Array, "*B joint"]) -> Float[Array, "*B joint"]:
    x = precision.at_least_float32(x)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
