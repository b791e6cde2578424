"""Gemma 3 (Gemma Team 2025), the sizes that read pictures."""

from mllm_jax.families.base import Family
from mllm_jax.families.gemma3 import config, keys
from mllm_jax.families.gemma3.model import Gemma3Config
from mllm_jax.families.gemma3.processor import Gemma3Processor
from mllm_jax.families.llava.keys import canonical_key
from mllm_jax.families.llava.sharding import sharding_rules

FAMILY = Family(
    name="gemma3",
    config=Gemma3Config,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    key_table=keys.key_table,
    canonical_key=canonical_key,
    is_unused=keys.is_unused,
    projector_prefix=keys.PROJECTOR_PREFIX,
    sharding_rules=sharding_rules,
    processor=Gemma3Processor,
    released={
        "gemma-3-4b": Gemma3Config.it_4b,
        "gemma-3-12b": Gemma3Config.it_12b,
        "gemma-3-27b": Gemma3Config.it_27b,
    },
)
