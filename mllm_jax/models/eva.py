"""The vision transformer of EVA (Fang et al. 2023), read at its last layer.

It has no norm before the first block, one after the last, and a bias
in the embedding of patches.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import clip, layers, vision_block
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """An EVA vision tower.

    Attributes:
        width: E.
        layers: the number of blocks.
        heads: N.
        mlp: F.
        image_size: the side of an image in pixels.
        patch: the side of a patch in pixels.
        act: the activation of the MLPs.
        eps: the epsilon of the layer norms.
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
        """The number of rows, and of columns, of patches."""
        return self.image_size // self.patch

    @property
    def has_cls(self) -> bool:
        """Whether a CLS token stands before the patches."""
        return True

    @property
    def run_layers(self) -> int:
        """The number of blocks that are run: all."""
        return self.layers

    @property
    def feature_tokens(self) -> int:
        """The number of tokens of the features: the patches and CLS."""
        return self.grid**2 + 1

    @property
    def block(self) -> vision_block.BlockConfig:
        """The config of each block."""
        return vision_block.BlockConfig(
            width=self.width, heads=self.heads, mlp=self.mlp, act=self.act, eps=self.eps
        )

    @classmethod
    def vit_g_14(cls) -> EvaConfig:
        """Return the config of ViT-g/14 at 224 pixels."""
        return cls()

    @classmethod
    def tiny(cls) -> EvaConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)


class EvaVision(nnx.Module):
    """The tower from pixels to features of CLS and of every patch."""

    def __init__(self, config: EvaConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.patch = layers.Linear(config.patch**2 * 3, config.width, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (1, config.width)))
        self.position = nnx.Param(normal(rngs.params(), (config.feature_tokens, config.width)))
        self.layers = layers.stack(
            lambda keys: vision_block.Block(config.block, rngs=keys), config.layers, rngs
        )
        self.norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)

    def __call__(self, pixels: Float[Array, "I row column 3"], tap) -> Float[Array, "I P E"]:
        """Return the normed features of the last layer; P counts the CLS token.

        Args:
            pixels: normalised images of image_size x image_size pixels.
            tap: the taps of the vision module.
        """
        x = self.patch(clip.patches(pixels, self.config.patch))
        cls = jnp.broadcast_to(self.cls[...], (len(x), *self.cls.shape)).astype(x.dtype)
        x = tap(S.embed, jnp.concatenate([cls, x], 1) + self.position[...])
        x, _ = tap.scan(lambda layer, x, tap, _: (layer(x, tap), None), self.layers, x)
        return self.norm(x)
