"""InternViT (Chen et al. 2024), the vision transformer of InternVL.

Its blocks scale what they add to the residual, and may norm queries and keys.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import clip, layers, vision_block
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVitConfig:
    """An InternViT vision tower.

    Attributes:
        width: E.
        layers: the number of blocks in the checkpoint.
        heads: N.
        mlp: F.
        image_size: the side of an image in pixels.
        patch: the side of a patch in pixels.
        act: the activation of the MLPs.
        eps: the epsilon of the norms.
        norm: layer norms or RMS norms.
        qkv_bias: whether the maps to queries, keys and values have a bias.
        qk_norm: whether queries and keys are normed.
        final_norm: whether a norm follows the last block.
        feature_layer: the hidden state that is read, counted as in HF: 0 is the embedding, -1 the
            output of the tower, after its final norm.
        select: "patch" drops the CLS token of the features, "full" keeps it.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image_size: int = 448
    patch: int = 14
    act: str = "gelu"
    eps: float = 1e-6
    norm: vision_block.Norm = "layer"
    qkv_bias: bool = True
    qk_norm: bool = False
    final_norm: bool = False
    feature_layer: int = -1
    select: Literal["patch", "full"] = "patch"

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
    def has_norm(self) -> bool:
        """Whether the features are normed."""
        return self.final_norm and self.feature_layer == -1

    @property
    def block(self) -> vision_block.BlockConfig:
        """The config of each block."""
        return vision_block.BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp=self.mlp,
            act=self.act,
            eps=self.eps,
            norm=self.norm,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            layer_scale=True,
        )

    def build(self, *, rngs: nnx.Rngs) -> InternVit:
        """Build the tower with random weights."""
        return InternVit(self, rngs=rngs)

    @classmethod
    def internvit_300m(cls) -> InternVitConfig:
        """Return the config of InternViT 300M at 448 pixels."""
        return cls()

    @classmethod
    def internvit_6b(cls) -> InternVitConfig:
        """Return the config of InternViT 6B at 448 pixels."""
        return cls(
            width=3200, layers=45, heads=25, mlp=12800, norm="rms", qkv_bias=False, qk_norm=True
        )

    @classmethod
    def tiny(cls) -> InternVitConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)


class InternVit(nnx.Module):
    """The tower from pixels to patch features; P counts the CLS token inside the tower."""

    def __init__(self, config: InternVitConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.patch = layers.Linear(config.patch**2 * 3, config.width, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (1, config.width)))
        self.position = nnx.Param(normal(rngs.params(), (config.grid**2 + 1, config.width)))
        self.layers = layers.stack(
            lambda keys: vision_block.Block(config.block, rngs=keys), config.run_layers, rngs
        )
        if config.has_norm:
            self.norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)

    def __call__(self, pixels: Float[Array, "I row column 3"], tap) -> Float[Array, "I P E"]:
        """Return the features of the selected layer, without CLS unless `select` is "full".

        Args:
            pixels: normalised images of image_size x image_size pixels.
            tap: the taps of the vision module.
        """
        x = self.patch(clip.patches(pixels, self.config.patch))
        cls = jnp.broadcast_to(self.cls[...], (len(x), *self.cls.shape)).astype(x.dtype)
        x = tap(S.embed, jnp.concatenate([cls, x], 1) + self.position[...])
        x, _ = tap.scan(lambda layer, x, tap, _: (layer(x, tap), None), self.layers, x)
        x = self.norm(x) if self.config.has_norm else x
        return x[:, 1:] if self.config.select == "patch" else x
