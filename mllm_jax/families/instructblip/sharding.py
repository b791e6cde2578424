"""The sharding rules of InstructBLIP."""

from __future__ import annotations

from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.sharding import rules


def sharding_rules(config: InstructBlipConfig) -> tuple[rules.Rule, ...]:
    """Return the sharding rules of an InstructBLIP model."""
    return (*rules.VISION, *rules.QFORMER, *rules.projector(config.projector.depth), *rules.DECODER)
