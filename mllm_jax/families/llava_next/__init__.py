"""LLaVA-NeXT, also called LLaVA-1.6 (Liu et al. 2024)."""

import dataclasses

from mllm_jax.families import llava
from mllm_jax.families.llava_next import config, keys, sharding
from mllm_jax.families.llava_next.model import LlavaNextConfig

FAMILY = dataclasses.replace(
    llava.FAMILY,
    name="llava_next",
    config=LlavaNextConfig,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    key_table=keys.key_table,
    sharding_rules=sharding.sharding_rules,
    released={
        "llava-next-vicuna-7b": LlavaNextConfig.vicuna_7b,
        "llava-next-vicuna-13b": LlavaNextConfig.vicuna_13b,
        "llava-next-mistral-7b": LlavaNextConfig.mistral_7b,
    },
)
