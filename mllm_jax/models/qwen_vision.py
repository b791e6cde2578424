"""The vision transformers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, for pictures of any size.

Their positions are rotary in two dimensions. Qwen2.5-VL attends in windows except in a few layers;
Qwen3-VL also has learned positions, and returns the outputs of some layers (DeepStack, Meng et al.
2024).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.models import grids, layers, rotary, vision_block
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """A vision tower of a Qwen-VL model.

    Attributes:
      width: The width E.
      layers: The number of blocks.
      heads: The number of heads N.
      mlp: The number of neurons of an MLP, F.
      patch: The side of a patch in pixels.
      frames: The number of frames in a patch; a picture fills all of them.
      merge: The side of the square of patches that becomes one token.
      act: The activation of the MLPs.
      eps: The epsilon of the norms.
      norm: Layer norms or RMS norms.
      gated: Whether the MLPs have a gate.
      patch_bias: Whether the embedding of patches has a bias.
      theta: The base of the rotary angles.
      table: The side of the square table of learned positions; 0 if there is none.
      window: The side of the attention windows, in patches; None if there are none.
      full_layers: The layers that attend to the whole picture instead of windows.
      deepstack: The layers whose outputs are returned in addition to that of the last one.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    patch: int
    frames: int = 2
    merge: int = 2
    act: str
    eps: float = 1e-6
    norm: vision_block.Norm = "layer"
    gated: bool = False
    patch_bias: bool = False
    theta: float = 10000.0
    table: int = 0
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    deepstack: tuple[int, ...] = ()

    @property
    def pixels(self) -> int:
        """The number of values of a patch: channel, frame, row, column."""
        return 3 * self.frames * self.patch**2

    @property
    def run_layers(self) -> int:
        """The number of blocks that are run: all."""
        return self.layers

    @property
    def feature_width(self) -> int:
        """The width of the features, including those of DeepStack."""
        return self.width * (1 + len(self.deepstack))

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
            gated=self.gated,
        )

    def build(self, *, rngs: nnx.Rngs) -> QwenVision:
        """Build the tower with random weights."""
        return QwenVision(self, rngs=rngs)

    @classmethod
    def version_2(cls) -> QwenVisionConfig:
        """Return the config of the tower of Qwen2-VL."""
        return cls(width=1280, layers=32, heads=16, mlp=5120, patch=14, act="quick_gelu")

    @classmethod
    def version_2_5(cls) -> QwenVisionConfig:
        """Return the config of the tower of Qwen2.5-VL."""
        return cls(
            width=1280, layers=32, heads=16, mlp=3420, patch=14, act="silu", norm="rms", gated=True,
            window=8, full_layers=(7, 15, 23, 31),
        )  # fmt: skip

    @classmethod
    def version_3(cls) -> QwenVisionConfig:
        """Return the config of the tower of Qwen3-VL 8B."""
        return cls(
            width=1152, layers=27, heads=16, mlp=4304, patch=16, act="gelu_tanh", patch_bias=True,
            table=48, deepstack=(8, 16, 24),
        )  # fmt: skip

    @classmethod
    def tiny(cls, version: str = "2.5") -> QwenVisionConfig:
        """Return a config for tests of "2", "2.5" or "3"."""
        real = {"2": cls.version_2, "2.5": cls.version_2_5, "3": cls.version_3}[version]()
        tiny = dataclasses.replace(real, width=32, layers=3, heads=4, mlp=64, patch=4)
        if version == "2.5":
            return dataclasses.replace(tiny, mlp=48, window=4, full_layers=(1,))
        return dataclasses.replace(tiny, table=5, deepstack=(0, 2)) if version == "3" else tiny


class QwenVision(nnx.Module):
    """The tower from patches to features of every patch."""

    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.patch = layers.Linear(
            config.pixels, config.width, use_bias=config.patch_bias, rngs=rngs
        )
        if config.table:
            self.position = nnx.Param(normal(rngs.params(), (config.table**2, config.width)))
        self.layers = layers.stack(
            lambda keys: vision_block.Block(config.block, rngs=keys), config.layers, rngs
        )

    def __call__(
        self, patches: Float[Array, "I P pixel"], grid: Int[Array, "I 2"], tap
    ) -> Float[Array, "I P E"]:
        """Return the features of the last layer, without a norm.

        With DeepStack, E is `feature_width`: the outputs of the layers in `deepstack` follow those
        of the last layer, side by side.

        Args:
          patches: Normalised patches in the order of `models.grids`; the values of one are
            (channel, frame, row, column), as in `pixel_values` of transformers.
          grid: The rows and columns of patches of each picture, multiples of `merge`; 0, 0 for a
            picture that only pads the batch.
          tap: The taps of the vision module.
        """
        config = self.config
        places = grids.Places.of(grid, patches.shape[1], config.merge)
        x = self.patch(patches)
        if config.table:
            x = x + places.interpolate(self.position[...], grid).astype(x.dtype)
        x = tap(S.embed, x)
        frequency = rotary.frequencies(config.width // config.heads // 2, config.theta)
        rope = places.rotation(frequency, frequency)
        window = None if config.window is None else places.window_mask(config.window)

        def step(layer, x, tap, is_full):
            mask = places.mask if window is None else jnp.where(is_full, places.mask, window)
            return layer(x, tap, mask, rope), None

        is_full, slots = self._by_layer()
        if not config.deepstack:  # the state alone is carried, so that a sweep resumes from it
            return tap.scan(step, self.layers, x, is_full)[0]

        def step_and_hand_on(layer, carry, tap, inputs):
            (x, handed_on), (is_full, slot) = carry, inputs
            x, _ = step(layer, x, tap, is_full)
            return (x, tuple(jnp.where(slot == i, x, y) for i, y in enumerate(handed_on))), None

        start = x, tuple(jnp.zeros_like(x) for _ in config.deepstack)
        (x, handed_on), _ = tap.scan(step_and_hand_on, self.layers, start, (is_full, slots))
        return jnp.concatenate([x, *handed_on], -1)

    def _by_layer(self) -> tuple[Array, Array]:
        """Return whether each layer attends to all patches, and its number in `deepstack`."""
        config, number = self.config, np.arange(self.config.layers)
        slot = np.full(config.layers, len(config.deepstack), np.int32)
        slot[list(config.deepstack)] = np.arange(len(config.deepstack))
        return jnp.asarray(np.isin(number, config.full_layers)), jnp.asarray(slot)
