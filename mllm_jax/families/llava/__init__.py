"""LLaVA and LLaVA-1.5 (Liu et al. 2023)."""

from mllm_jax.families.base import Family
from mllm_jax.families.llava import config, keys, original, sharding
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.processors.processor import Processor

FAMILY = Family(
    name="llava",
    config=LlavaConfig,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    key_table=keys.key_table,
    canonical_key=keys.canonical_key,
    is_unused=keys.is_unused,
    unused_tensors=keys.unused_tensors,
    projector_prefix=keys.PROJECTOR_PREFIX,
    sharding_rules=sharding.sharding_rules,
    processor=Processor,
    released={
        "embedded": LlavaConfig.embedded,
        "llava-1.5-7b": LlavaConfig.llava_1_5_7b,
        "llava-1.5-13b": LlavaConfig.llava_1_5_13b,
    },
    original=original.LAYOUT,
)
