"""EVA's vision transformer (Fang et al. 2023), as InstructBLIP uses it: the last layer is read.

Its blocks are CLIP's. Around them it differs: no norm before the first block, one after the last,
and a bias where patches are embedded.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import clip, layers
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """An EVA vision tower.

    Attributes:
      width: E. layers: blocks. heads: N. mlp: F.
      image_size, patch: pixels; the grid has image_size // patch rows.
      act: activation of the MLPs. eps: of the layer norms.
    """

    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp: int = 6144
    image_size: int = 224
    patch: int = 14
    act: str = "gelu"
    eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Rows, and columns, of patches."""
        return self.image_size // self.patch

    @property
    def run_layers(self) -> int:
        """Blocks that exist here: all."""
        return self.layers

    @property
    def feature_tokens(self) -> int:
        """Tokens of its features: the patches, and CLS."""
        return self.grid**2 + 1

    @classmethod
    def vit_g_14(cls) -> EvaConfig:
        """Return the config of EVA ViT-g/14 at 224 pixels."""
        return cls()

    @classmethod
    def tiny(cls) -> EvaConfig:
        """Return a config small enough for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)


class EvaVision(nnx.Module):
    """Pixels to features of CLS and of every patch."""

    def __init__(self, config: EvaConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.patch = layers.Linear(config.patch**2 * 3, config.width, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (1, config.width)))
        self.position = nnx.Param(normal(rngs.params(), (config.feature_tokens, config.width)))
        self.layers = layers.stack(lambda keys: clip.Block(config, rngs=keys), config.layers, rngs)
        self.norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)

    def __call__(self, pixels: Float[Array, "I row column 3"], tap) -> Float[Array, "I P E"]:
        """Features of the last layer, normed; P counts the CLS token.

        Args:
          pixels: normalised, image_size squared.
          tap: the taps of the vision module.
        """
        x = self.patch(clip.patches(pixels, self.config.patch))
        cls = jnp.broadcast_to(self.cls[...], (len(x), *self.cls.shape)).astype(x.dtype)
        x = tap(S.embed, jnp.concatenate([cls, x], 1) + self.position[...])
        x, _ = tap.scan(lambda layer, x, tap, _: (layer(x, tap), None), self.layers, x)
        return self.norm(x)
