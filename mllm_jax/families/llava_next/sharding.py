"""The sharding rules of LLaVA-NeXT: those of LLaVA with the newline."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from mllm_jax.families.llava import sharding as llava
from mllm_jax.families.llava_next.model import LlavaNextConfig
from mllm_jax.sharding import rules


def sharding_rules(config: LlavaNextConfig) -> tuple[rules.Rule, ...]:
    """Return the sharding rules of a LLaVA-NeXT model."""
    return (*llava.sharding_rules(config), (r"newline", PartitionSpec(None)))
