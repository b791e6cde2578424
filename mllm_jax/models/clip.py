"""The vision transformer of CLIP (Radford et al. 2021), read at one hidden layer.

Layers above that layer are neither loaded nor run, so they offer no sites.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import layers, vision_block
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A CLIP vision tower.

    Attributes:
        width: E.
        layers: the number of blocks in the checkpoint.
        heads: N.
        mlp: F.
        image_size: the side of an image in pixels.
        patch: the side of a patch in pixels.
        act: the activation of the MLPs: "quick_gelu" (OpenAI's weights) or "gelu".
        eps: the epsilon of the layer norms.
        feature_layer: the hidden state that is read, counted as in HF: 0 is the embedding, -1 the
            last layer.
        select: "patch" drops the CLS token of the features, "full" keeps it.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image_size: int = 336
    patch: int = 14
    act: str = "quick_gelu"
    eps: float = 1e-5
    feature_layer: int = -2
    select: str = "patch"

    @property
    def grid(self) -> int:
        """The number of rows, and of columns, of patches."""
        return self.image_size // self.patch

    @property
    def feature_tokens(self) -> int:
        """The number of tokens of the features."""
        return self.grid**2 + (self.select == "full")

    @property
    def has_cls(self) -> bool:
        """Whether a CLS token stands before the patches inside of the tower."""
        return True

    @property
    def run_layers(self) -> int:
        """The number of blocks below the feature layer; only these exist."""
        at = self.feature_layer
        return at if at >= 0 else self.layers + 1 + at

    @property
    def block(self) -> vision_block.BlockConfig:
        """The config of each block."""
        return vision_block.BlockConfig(
            width=self.width, heads=self.heads, mlp=self.mlp, act=self.act, eps=self.eps
        )

    def build(self, *, rngs: nnx.Rngs) -> ClipVision:
        """Build the tower with random weights."""
        return ClipVision(self, rngs=rngs)

    @classmethod
    def vit_l_14_336(cls) -> ClipConfig:
        """Return the config of ViT-L/14 at 336 pixels."""
        return cls()

    @classmethod
    def vit_b_16(cls) -> ClipConfig:
        """Return the config of ViT-B/16 at 224 pixels."""
        return cls(width=768, layers=12, heads=12, mlp=3072, image_size=224, patch=16)

    @classmethod
    def tiny(cls) -> ClipConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)


class ClipVision(nnx.Module):
    """The tower from pixels to patch features; P counts the CLS token inside the tower."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        pixels = config.patch**2 * 3
        self.config = config
        self.patch = layers.Linear(pixels, config.width, use_bias=False, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (config.width,)))
        self.position = nnx.Param(normal(rngs.params(), (config.grid**2 + 1, config.width)))
        self.pre_norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)
        self.layers = layers.stack(
            lambda keys: vision_block.Block(config.block, rngs=keys), config.run_layers, rngs
        )

    def __call__(self, pixels: Float[Array, "I row column 3"], tap) -> Float[Array, "I P E"]:
        """Return the features of the selected layer, without CLS unless `select` is "full".

        Args:
            pixels: normalised images of image_size x image_size pixels.
            tap: the taps of the vision module.
        """
        x = self.patch(patches(pixels, self.config.patch))
        cls = jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1])).astype(x.dtype)
        x = jnp.concatenate([cls, x], 1) + self.position[...]
        x = tap(S.embed, self.pre_norm(x))
        x, _ = tap.scan(lambda layer, x, tap, _: (layer(x, tap), None), self.layers, x)
        return x[:, 1:] if self.config.select == "patch" else x


def patches(pixels: Float[Array, "I row column 3"], size: int) -> Float[Array, "I P pixel"]:
    """Cut images into square patches, row by row; the pixels of one are (row, column, channel)."""
    I, H, W, C = pixels.shape
    x = pixels.reshape(I, H // size, size, W // size, size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(I, (H // size) * (W // size), size * size * C)
