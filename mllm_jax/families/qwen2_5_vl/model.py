"""The Qwen-VL models (Wang et al. 2024, Bai et al. 2025): native resolution and mRoPE.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL share one network with different parts. In Qwen3-VL the outputs of
some layers of the tower are added to the states after the first layers of the LM (DeepStack).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Self

from flax import nnx

from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.free_grid import FreeGridConfig, FreeGridModel
from mllm_jax.models.projector import ProjectorConfig
from mllm_jax.models.qwen_vision import QwenVision, QwenVisionConfig
from mllm_jax.models.rotary import RopeSections

Version = Literal["2", "2.5", "3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLConfig(FreeGridConfig):
    """A Qwen2.5-VL model, and the base of the other Qwen-VL families; see `FreeGridConfig`.

    Attributes:
      version: The generation, which determines the fields of the tower and the language model.
    """

    version: ClassVar[Version] = "2.5"

    vision: QwenVisionConfig  # type: ignore[assignment]  # narrower than that of the base
    image_token: int = 151655

    def build(self, *, rngs: nnx.Rngs) -> QwenVL:
        """Build the model with random weights."""
        return QwenVL(self, rngs=rngs)

    @classmethod
    def of(cls, vision: QwenVisionConfig, lm: DecoderConfig, **fields) -> Self:
        """Return a Qwen of a tower and a language model, with the merger between them."""
        projector = ProjectorConfig.qwen(
            vision.width,
            lm.width,
            norm="rms" if cls.version == "2.5" else "layer",
            fold=vision.merge,
            deepstack=len(vision.deepstack),
        )
        return cls(vision=vision, projector=projector, lm=lm, **fields)

    @classmethod
    def qwen2_5_vl_3b(cls) -> QwenVLConfig:
        """Return the config of Qwen2.5-VL 3B."""
        return cls.of(QwenVisionConfig.version_2_5(), lm_3b())

    @classmethod
    def qwen2_5_vl_7b(cls) -> QwenVLConfig:
        """Return the config of Qwen2.5-VL 7B."""
        return cls.of(QwenVisionConfig.version_2_5(), lm_7b())

    @classmethod
    def qwen2_5_vl_32b(cls) -> QwenVLConfig:
        """Return the config of Qwen2.5-VL 32B."""
        vision = dataclasses.replace(QwenVisionConfig.version_2_5(), mlp=3456)
        lm = qwen2_lm(width=5120, layers=64, heads=40, kv_heads=8, mlp=27648)
        return cls.of(vision, lm)

    @classmethod
    def qwen2_5_vl_72b(cls) -> QwenVLConfig:
        """Return the config of Qwen2.5-VL 72B."""
        return cls.of(dataclasses.replace(QwenVisionConfig.version_2_5(), mlp=3456), lm_72b())

    @classmethod
    def tiny(cls) -> Self:
        """Return a config for tests."""
        lm = dataclasses.replace(
            DecoderConfig.tiny(), biases="qkv", rope_sections=RopeSections((2, 1, 1))
        )
        vision = QwenVisionConfig.tiny("2.5")
        return cls.of(vision, lm, image_token=95)


def qwen2_lm(
    *, width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int = 152064,
    tied: bool = False,
) -> DecoderConfig:  # fmt: skip
    """Return the config of the Qwen2 with mRoPE of Qwen2-VL and Qwen2.5-VL."""
    return DecoderConfig(
        vocab=vocab, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
        head_width=width // heads, mlp=mlp, rope_theta=1e6,
        rope_sections=RopeSections((16, 24, 24)), eps=1e-6, biases="qkv", tied=tied,
    )  # fmt: skip


def lm_3b() -> DecoderConfig:
    """Return the config of the language model of Qwen2.5-VL 3B."""
    return qwen2_lm(width=2048, layers=36, heads=16, kv_heads=2, mlp=11008, vocab=151936, tied=True)


def lm_7b() -> DecoderConfig:
    """Return the config of the language model of the 7B models."""
    return qwen2_lm(width=3584, layers=28, heads=28, kv_heads=4, mlp=18944)


def lm_72b() -> DecoderConfig:
    """Return the config of the language model of the 72B models."""
    return qwen2_lm(width=8192, layers=80, heads=64, kv_heads=8, mlp=29568)


class QwenVL(FreeGridModel):
    """The network of the Qwen-VL families."""

    config: QwenVLConfig
    vision: QwenVision
