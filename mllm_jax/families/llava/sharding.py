"""The sharding rules of LLaVA."""

from __future__ import annotations

from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.sharding import rules


def sharding_rules(config: LlavaConfig) -> tuple[rules.Rule, ...]:
    """Return the sharding rules of a LLaVA model."""
    return (*rules.VISION, *rules.projector(config.projector.depth), *rules.DECODER)
