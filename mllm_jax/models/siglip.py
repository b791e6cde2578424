"""The vision transformer of SigLIP (Zhai et al. 2023), whole or read at one hidden layer.

It has no CLS token, and a bias in the embedding of patches. Idefics3 and SmolVLM have the same
tower: the places of the patches of a full square tile are those of the table.
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from mllm_jax.models import clip, layers, vision_block
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """A SigLIP vision tower.

    Attributes:
        width: E.
        layers: the number of blocks in the checkpoint.
        heads: N.
        mlp: F.
        image_size: the side of an image in pixels.
        patch: the side of a patch in pixels.
        act: the activation of the MLPs.
        eps: the epsilon of the layer norms.
        feature_layer: the hidden state that is read without the last norm, counted as in HF: 0 is
            the embedding, -1 the last layer. With None the whole tower is read, the norm included.
    """

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    image_size: int = 384
    patch: int = 14
    act: str = "gelu_tanh"
    eps: float = 1e-6
    feature_layer: int | None = None

    @property
    def grid(self) -> int:
        """The number of rows, and of columns, of patches."""
        return self.image_size // self.patch

    @property
    def feature_tokens(self) -> int:
        """The number of tokens of the features: the patches."""
        return self.grid**2

    @property
    def has_cls(self) -> bool:
        """Whether a CLS token stands before the patches inside of the tower."""
        return False

    @property
    def run_layers(self) -> int:
        """The number of blocks below the feature layer; only these exist."""
        at = self.feature_layer
        if at is None:
            return self.layers
        return at if at >= 0 else self.layers + 1 + at

    @property
    def block(self) -> vision_block.BlockConfig:
        """The config of each block."""
        return vision_block.BlockConfig(
            width=self.width, heads=self.heads, mlp=self.mlp, act=self.act, eps=self.eps
        )

    def build(self, *, rngs: nnx.Rngs) -> SiglipVision:
        """Build the tower with random weights."""
        return SiglipVision(self, rngs=rngs)

    @classmethod
    def so400m_14_384(cls) -> SiglipConfig:
        """Return the config of SigLIP So400m/14 at 384 pixels."""
        return cls()

    @classmethod
    def tiny(cls) -> SiglipConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)


class SiglipVision(nnx.Module):
    """The tower from pixels to features of every patch."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.patch = layers.Linear(config.patch**2 * 3, config.width, rngs=rngs)
        self.position = nnx.Param(normal(rngs.params(), (config.grid**2, config.width)))
        self.layers = layers.stack(
            lambda keys: vision_block.Block(config.block, rngs=keys), config.run_layers, rngs
        )
        if config.feature_layer is None:
            self.norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)

    def __call__(self, pixels: Float[Array, "I row column 3"], tap) -> Float[Array, "I P E"]:
        """Return the features of the selected layer, or those after the last norm.

        Args:
            pixels: normalised images of image_size x image_size pixels.
            tap: the taps of the vision module.
        """
        side = self.config.grid * self.config.patch  # of 384 pixels, patches of 14 fill 378
        x = self.patch(clip.patches(pixels[:, :side, :side], self.config.patch))
        x = tap(S.embed, x + self.position[...])
        x, _ = tap.scan(lambda layer, x, tap, _: (layer(x, tap), None), self.layers, x)
        return self.norm(x) if self.config.feature_layer is None else x
