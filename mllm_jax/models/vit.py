"""The vision transformer of square pictures. CLIP, SigLIP, InternViT and EVA are configs of it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import layers, vision_block
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A vision transformer of square pictures.

    Attributes:
      width: The width E.
      layers: The number of blocks in the checkpoint.
      heads: The number of heads N.
      mlp: The number of neurons of an MLP, F.
      image_size: The side of an image in pixels.
      patch: The side of a patch in pixels.
      act: The activation of the MLPs.
      eps: The epsilon of the norms.
      has_cls: Whether a CLS token precedes the patches inside the tower.
      patch_bias: Whether the embedding of patches has a bias.
      has_pre_norm: Whether there is a norm before the first block.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    image_size: int
    patch: int
    act: str
    eps: float
    has_cls: ClassVar[bool] = True
    patch_bias: ClassVar[bool] = True
    has_pre_norm: ClassVar[bool] = False

    @property
    def grid(self) -> int:
        """The number of rows, and of columns, of patches."""
        return self.image_size // self.patch

    @property
    def run_layers(self) -> int:
        """The number of blocks below the features; only these exist."""
        return self.layers

    @property
    def has_norm(self) -> bool:
        """Whether the features are normalised."""
        return False

    @property
    def keeps_cls(self) -> bool:
        """Whether the CLS token is one of the features."""
        return self.has_cls

    @property
    def feature_tokens(self) -> int:
        """The number of tokens of the features."""
        return self.grid**2 + self.keeps_cls

    @property
    def block(self) -> vision_block.BlockConfig:
        """The config of each block."""
        return vision_block.BlockConfig(
            width=self.width, heads=self.heads, mlp=self.mlp, act=self.act, eps=self.eps
        )

    def build(self, *, rngs: nnx.Rngs) -> Vit:
        """Build the tower with random weights."""
        return Vit(self, rngs=rngs)


class Vit(nnx.Module):
    """The tower from pixels to features; P counts the CLS token inside the tower."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        normal, E, P = nnx.initializers.normal(0.02), config.width, config.grid**2
        self.config = config
        self.patch = layers.Linear(config.patch**2 * 3, E, use_bias=config.patch_bias, rngs=rngs)
        if config.has_cls:
            self.cls = nnx.Param(normal(rngs.params(), (E,)))
        self.position = nnx.Param(normal(rngs.params(), (P + config.has_cls, E)))
        if config.has_pre_norm:
            self.pre_norm = layers.LayerNorm(E, eps=config.eps, rngs=rngs)
        self.layers = layers.stack(
            lambda keys: vision_block.Block(config.block, rngs=keys), config.run_layers, rngs
        )
        if config.has_norm:
            self.norm = layers.LayerNorm(E, eps=config.eps, rngs=rngs)

    def __call__(self, pixels: Float[Array, "I row column 3"], tap) -> Float[Array, "I P E"]:
        """Return the features of the selected layer.

        Args:
          pixels: Normalised images of image_size x image_size pixels. Pixels beyond the last whole
            patch are dropped: of 384 pixels, patches of 14 cover 378.
          tap: The taps of the vision module.
        """
        config = self.config
        side = config.grid * config.patch
        x = self.patch(patches(pixels[:, :side, :side], config.patch))
        if config.has_cls:
            cls = jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1])).astype(x.dtype)
            x = jnp.concatenate([cls, x], 1)
        x = x + self.position[...]
        x = tap(S.embed, self.pre_norm(x) if config.has_pre_norm else x)
        x, _ = tap.scan(lambda layer, x, tap, _: (layer(x, tap), None), self.layers, x)
        x = self.norm(x) if config.has_norm else x
        return x[:, 1:] if config.has_cls and not config.keeps_cls else x


def patches(pixels: Float[Array, "I row column 3"], size: int) -> Float[Array, "I P pixel"]:
    """Cut images into square patches, row by row; the pixels of one are (row, column, channel)."""
    I, H, W, C = pixels.shape
    x = pixels.reshape(I, H // size, size, W // size, size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(I, (H // size) * (W // size), size * size * C)
