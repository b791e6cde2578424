"""The sharding rules of the Qwen-VL models."""

from __future__ import annotations

from mllm_jax.families.qwen2_5_vl.model import QwenVLConfig
from mllm_jax.sharding import rules


def sharding_rules(config: QwenVLConfig) -> tuple[rules.Rule, ...]:
    """Return the sharding rules of a Qwen-VL model."""
    return (*rules.VISION, *rules.projector(config.projector.depth), *rules.DECODER)
