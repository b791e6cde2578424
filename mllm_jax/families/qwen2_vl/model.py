"""Qwen2-VL (Wang et al. 2024): a Qwen-VL whose tower attends to the whole picture."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from mllm_jax.families.qwen2_5_vl import model as qwen
from mllm_jax.models.qwen_vision import QwenVisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2VLConfig(qwen.QwenVLConfig):
    """A Qwen2-VL model; see `QwenVLConfig`."""

    version: ClassVar[qwen.Version] = "2"

    @classmethod
    def qwen2_vl_2b(cls) -> Qwen2VLConfig:
        """Return the config of Qwen2-VL 2B."""
        lm = qwen.qwen2_lm(
            width=1536, layers=28, heads=12, kv_heads=2, mlp=8960, vocab=151936, tied=True
        )
        return cls.of(QwenVisionConfig.version_2(), lm)

    @classmethod
    def qwen2_vl_7b(cls) -> Qwen2VLConfig:
        """Return the config of Qwen2-VL 7B."""
        return cls.of(QwenVisionConfig.version_2(), qwen.lm_7b())

    @classmethod
    def qwen2_vl_72b(cls) -> Qwen2VLConfig:
        """Return the config of Qwen2-VL 72B."""
        return cls.of(QwenVisionConfig.version_2(), qwen.lm_72b())

    @classmethod
    def tiny(cls) -> Self:
        """Return a config for tests."""
        vision = dataclasses.replace(QwenVisionConfig.tiny("2"), mlp=64)
        other = qwen.QwenVLConfig.tiny()
        return cls.of(vision, other.lm, image_token=other.image_token)
