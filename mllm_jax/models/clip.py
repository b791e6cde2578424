"""CLIP's vision transformer (Radford et al. 2021), as LLaVA uses it: one hidden layer is read.

Layers above the one that is read are neither loaded nor run, so they offer no sites.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import layers
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A CLIP vision tower.

    Attributes:
      width: E. layers: blocks in the checkpoint. heads: N. mlp: F.
      image_size, patch: pixels; the grid has image_size // patch rows.
      act: "quick_gelu" (OpenAI's weights) or "gelu". eps: of the layer norms.
      feature_layer: the hidden state read, counted as HF does: 0 is the embedding, -1 the last.
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
        """Rows, and columns, of patches."""
        return self.image_size // self.patch

    @property
    def feature_tokens(self) -> int:
        """Tokens of its features."""
        return self.grid**2 + (self.select == "full")

    @property
    def run_layers(self) -> int:
        """Blocks below the feature layer: those that exist here."""
        at = self.feature_layer
        return at if at >= 0 else self.layers + 1 + at

    @classmethod
    def vit_l_14_336(cls) -> ClipConfig:
        """Return the config of OpenAI's ViT-L/14 at 336 pixels."""
        return cls()

    @classmethod
    def vit_b_16(cls) -> ClipConfig:
        """Return the config of OpenAI's ViT-B/16 at 224 pixels."""
        return cls(width=768, layers=12, heads=12, mlp=3072, image_size=224, patch=16)

    @classmethod
    def tiny(cls) -> ClipConfig:
        """Return a config small enough for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)


class Attention(nnx.Module):
    """Multi-head self-attention of the patches."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (
            layers.Linear(config.width, config.width, rngs=rngs) for _ in range(4)
        )

    def __call__(
        self, x: Float[Array, "I P E"], mask: Bool[Array, "I 1 P P"] | None = None
    ) -> Float[Array, "I P E"]:
        """Return the output of all heads."""
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        heads = layers.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        return self.o(heads.reshape(x.shape))


class MLP(nnx.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.up = layers.Linear(config.width, config.mlp, rngs=rngs)
        self.down = layers.Linear(config.mlp, config.width, rngs=rngs)
        self.act = config.act

    def __call__(self, x: Float[Array, "I P E"], tap) -> Float[Array, "I P E"]:
        """Apply the maps."""
        act = tap(S.mlp.act, layers.ACTIVATIONS[self.act](self.up(x)))
        return tap(S.mlp.out, self.down(act))


class Block(nnx.Module):
    """One transformer block with norms before its attention and its MLP."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.norm1 = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "I P E"], tap, mask: Bool[Array, "I 1 P P"] | None = None
    ) -> Float[Array, "I P E"]:
        """Apply the block."""
        x = tap(S.resid_pre, x)
        x = x + tap(S.attn_out, self.attn(self.norm1(x), mask))
        x = x + self.mlp(self.norm2(x), tap)
        return tap(S.resid_post, x)


class ClipVision(nnx.Module):
    """Pixels to patch features. P counts the CLS token inside the tower."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        pixels = config.patch**2 * 3
        self.config = config
        self.patch = layers.Linear(pixels, config.width, use_bias=False, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (config.width,)))
        self.position = nnx.Param(normal(rngs.params(), (config.grid**2 + 1, config.width)))
        self.pre_norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)
        self.layers = layers.stack(lambda keys: Block(config, rngs=keys), config.run_layers, rngs)

    def __call__(self, pixels: Float[Array, "I row column 3"], tap) -> Float[Array, "I P E"]:
        """Features of the selected layer, without CLS unless `select` is "full".

        Args:
          pixels: normalised, image_size squared.
          tap: the taps of the vision module.
        """
        x = self.patch(patches(pixels, self.config.patch))
        cls = jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1])).astype(x.dtype)
        x = jnp.concatenate([cls, x], 1) + self.position[...]
        x = tap(S.embed, self.pre_norm(x))
        x, _ = tap.scan(lambda layer, x, tap, _: (layer(x, tap), None), self.layers, x)
        return x[:, 1:] if self.config.select == "patch" else x


def patches(pixels: Float[Array, "I row column 3"], size: int) -> Float[Array, "I P pixel"]:
    """The picture cut in squares, row by row; a square's pixels are (row, column, channel)."""
    I, H, W, C = pixels.shape
    x = pixels.reshape(I, H // size, size, W // size, size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(I, (H // size) * (W // size), size * size * C)
