"""Rotary position embeddings (Su et al. 2021), in the layout of two halves."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mllm_jax.typing import Array, Float, Int

Rotation = tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]  # cosine, sine


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The scaling of frequencies for rows longer than those of a model's first training.

    Attributes:
      kind: "linear" divides all frequencies by the factor (Chen et al. 2023); "llama3" divides low
        ones, keeps high ones, and interpolates between (Llama 3.1).
      factor: The factor.
      low: Frequencies with periods of at least original_length / low are divided by the factor.
      high: Frequencies with periods of at most original_length / high are kept.
      original_length: The length of the rows of the first training.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def scale(self, frequency: Float[np.ndarray, " H/2"]) -> Float[np.ndarray, " H/2"]:
        """Return the scaled frequencies, in float32 in the order of transformers."""
        if self.kind == "linear":
            return frequency / np.float32(self.factor)
        period = np.float32(2 * math.pi) / frequency
        smooth = self.original_length / period - np.float32(self.low)
        smooth = smooth / np.float32(self.high - self.low)
        divided = frequency / np.float32(self.factor)
        between = (1 - smooth) * divided + smooth * frequency
        scaled = np.where(period > self.original_length / self.low, divided, between)
        return np.where(period < self.original_length / self.high, frequency, scaled)


def frequencies(
    head_width: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " H/2"]:
    """Return the frequencies of a head in float32: theta^(-2i / H) for i below H / 2."""
    # On the host and in this order, as in training. The power is rounded once from float64: in
    # float32 its last bit depends on the CPU, and one ulp of a frequency changes the angle by 1e-4
    # at position 4096.
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    power = np.float64(theta) ** exponent.astype(np.float64)
    frequency = np.float32(1) / power.astype(np.float32)
    return frequency if scaling is None else scaling.scale(frequency).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RopeSections:
    """The axis of position of each frequency: time, row or column (mRoPE).

    Attributes:
      sizes: The number of frequencies of each axis.
      interleaved: Whether the axes alternate, with the rest for time at the end (Qwen3-VL), or
        follow each other (Qwen2-VL, Qwen2.5-VL).
    """

    sizes: tuple[int, int, int]
    interleaved: bool = False

    def axes(self) -> Int[np.ndarray, " H/2"]:
        """Return the axis of each frequency."""
        if not self.interleaved:
            return np.repeat(np.arange(3), self.sizes)
        axis = np.zeros(sum(self.sizes), int)
        for number in (1, 2):
            axis[number : 3 * self.sizes[number] : 3] = number
        return axis


def rotation(
    position: Int[Array, "B T"] | Int[Array, "3 B T"],
    frequency: Float[np.ndarray, " H/2"],
    sections: RopeSections | None = None,
) -> Rotation:
    """Return cosine and sine of the angle of each token.

    Args:
      position: The positions; by axis if there are sections.
      frequency: The frequencies.
      sections: The axis of each frequency.
    """
    if sections is not None and position.ndim == 3:
        by_frequency = jnp.moveaxis(position[sections.axes()], 0, -1)
    else:
        by_frequency = position[..., None]
    angle = by_frequency.astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], -1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotate x by the angle of each token."""
    half = x.shape[-1] // 2
    rotated = jnp.concatenate([-x[..., half:], x[..., :half]], -1)
    return (x * cos + rotated * sin).astype(x.dtype)
