"""The sharding rules of Gemma 3."""

from __future__ import annotations

from mllm_jax.families.gemma3.model import Gemma3Config
from mllm_jax.sharding import rules


def sharding_rules(config: Gemma3Config) -> tuple[rules.Rule, ...]:
    """Return the sharding rules of a Gemma 3 model."""
    return (*rules.VISION, *rules.projector(config.projector.depth), *rules.DECODER)
