"""The vision transformer of Pixtral (Agrawal et al. 2024), for pictures of any size."""

from __future__ import annotations

import dataclasses

from flax import nnx

from mllm_jax.models import grids, layers, rotary, vision_block
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Float, Int

_EPS = 1e-5  # of all norms, whatever the checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixtralConfig:
    """A Pixtral vision tower.

    Attributes:
      width: The width E.
      layers: The number of blocks in the checkpoint.
      heads: The number of heads N.
      mlp: The number of neurons of an MLP, F.
      patch: The side of a patch in pixels.
      image_size: The longest side of an image in pixels.
      act: The activation of the MLPs.
      theta: The base of the rotary angles.
      merge: The side of the square of patches that becomes one token: 2 for Mistral 3.
      feature_layer: The hidden state that is read, counted as in HF: 0 is the embedding, -1 the
        last layer.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    patch: int = 16
    image_size: int = 1024
    act: str = "gelu"
    theta: float = 10000.0
    merge: int = 1
    feature_layer: int = -1

    @property
    def pixels(self) -> int:
        """The number of values of a patch: channel, row, column."""
        return 3 * self.patch**2

    @property
    def run_layers(self) -> int:
        """The number of blocks below the feature layer; only these exist."""
        return vision_block.layers_below(self.feature_layer, self.layers)

    @property
    def block(self) -> vision_block.BlockConfig:
        """The config of each block."""
        return vision_block.BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp=self.mlp,
            act=self.act,
            eps=_EPS,
            norm="rms",
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            gated=True,
        )

    def build(self, *, rngs: nnx.Rngs) -> PixtralVision:
        """Build the tower with random weights."""
        return PixtralVision(self, rngs=rngs)

    @classmethod
    def pixtral_12b(cls) -> PixtralConfig:
        """Return the config of the tower of Pixtral 12B."""
        return cls(act="silu")

    @classmethod
    def mistral_small_3_1(cls) -> PixtralConfig:
        """Return the config of the tower of Mistral Small 3.1."""
        return cls(patch=14, image_size=1540, act="silu", merge=2)

    @classmethod
    def tiny(cls) -> PixtralConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=48, patch=4, image_size=48, act="silu")


class PixtralVision(nnx.Module):
    """The tower from patches to features of every patch."""

    def __init__(self, config: PixtralConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch = layers.Linear(config.pixels, config.width, use_bias=False, rngs=rngs)
        self.pre_norm = layers.RMSNorm(config.width, eps=_EPS, rngs=rngs)
        self.layers = layers.stack(
            lambda keys: vision_block.Block(config.block, rngs=keys), config.run_layers, rngs
        )

    def __call__(
        self, patches: Float[Array, "I P pixel"], grid: Int[Array, "I 2"], tap
    ) -> Float[Array, "I P E"]:
        """Return the features of the selected layer.

        Args:
          patches: Normalised patches in the order of `models.grids`; the values of one are
            (channel, row, column).
          grid: The rows and columns of patches of each picture, multiples of `merge`; 0, 0 for a
            picture that only pads the batch.
          tap: The taps of the vision module.
        """
        config = self.config
        places = grids.Places.of(grid, patches.shape[1], config.merge)
        frequency = rotary.frequencies(config.width // config.heads, config.theta)
        rope = places.rotation(frequency[::2], frequency[1::2])
        x = tap(S.embed, self.pre_norm(self.patch(patches)))

        def step(layer, x, tap, _):
            return layer(x, tap, places.mask, rope), None

        x, _ = tap.scan(step, self.layers, x)
        return x
