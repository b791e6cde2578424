"""Qwen3-VL, dense: a Qwen-VL with DeepStack (Meng et al. 2024) and a Qwen3 as language model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from mllm_jax.families.qwen2_5_vl import model as qwen
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.qwen_vision import QwenVisionConfig
from mllm_jax.models.rotary import RopeSections


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(qwen.QwenVLConfig):
    """A Qwen3-VL model; see `QwenVLConfig`."""

    version: ClassVar[qwen.Version] = "3"

    @classmethod
    def qwen3_vl_2b(cls) -> Qwen3VLConfig:
        """Return the config of Qwen3-VL 2B."""
        return cls.of(_small_tower(), _lm(width=2048, layers=28, heads=16, mlp=6144, tied=True))

    @classmethod
    def qwen3_vl_4b(cls) -> Qwen3VLConfig:
        """Return the config of Qwen3-VL 4B."""
        return cls.of(_small_tower(), _lm(width=2560, layers=36, heads=32, mlp=9728, tied=True))

    @classmethod
    def qwen3_vl_8b(cls) -> Qwen3VLConfig:
        """Return the config of Qwen3-VL 8B."""
        lm = _lm(width=4096, layers=36, heads=32, mlp=12288)
        return cls.of(QwenVisionConfig.version_3(), lm)

    @classmethod
    def qwen3_vl_32b(cls) -> Qwen3VLConfig:
        """Return the config of Qwen3-VL 32B."""
        lm = _lm(width=5120, layers=64, heads=64, mlp=25600)
        return cls.of(QwenVisionConfig.version_3(), lm)

    @classmethod
    def tiny(cls) -> Self:
        """Return a config for tests; the heads of its LM do not divide its width."""
        lm = dataclasses.replace(
            DecoderConfig.tiny(), head_width=16, qk_norm=True,
            rope_sections=RopeSections((4, 2, 2), interleaved=True),
        )  # fmt: skip
        vision = QwenVisionConfig.tiny("3")
        return cls.of(vision, lm, image_token=95)


def _lm(*, width: int, layers: int, heads: int, mlp: int, tied: bool = False) -> DecoderConfig:
    """Return the config of a Qwen3 with interleaved mRoPE."""
    return DecoderConfig(
        vocab=151936, width=width, layers=layers, heads=heads, kv_heads=8, head_width=128, mlp=mlp,
        rope_theta=5e6, rope_sections=RopeSections((24, 20, 20), interleaved=True), eps=1e-6,
        qk_norm=True, tied=tied,
    )  # fmt: skip


def _small_tower() -> QwenVisionConfig:
    """Return the config of the tower of Qwen3-VL 2B and 4B."""
    return dataclasses.replace(
        QwenVisionConfig.version_3(), width=1024, layers=24, mlp=4096, deepstack=(5, 11, 17)
    )
