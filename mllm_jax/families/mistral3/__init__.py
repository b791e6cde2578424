"""Mistral 3: Mistral Small 3.1 and 3.2 (2025)."""

from mllm_jax.families.base import Family
from mllm_jax.families.llava import sharding
from mllm_jax.families.mistral3 import config, keys
from mllm_jax.families.mistral3.model import Mistral3Config
from mllm_jax.families.mistral3.processor import Mistral3Processor

FAMILY = Family(
    name="mistral3",
    config=Mistral3Config,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    key_table=keys.key_table,
    canonical_key=keys.canonical_key,
    is_unused=keys.is_unused,
    projector_prefix=keys.PROJECTOR_PREFIX,
    sharding_rules=sharding.sharding_rules,
    processor=Mistral3Processor,
    released={"mistral-small-3.1-24b": Mistral3Config.mistral_small_3_1},
)
