"""Idefics3 (Laurençon et al. 2024), and the first SmolVLM, which is released under its name."""

import functools

from mllm_jax.families.base import Family
from mllm_jax.families.idefics3 import config, keys
from mllm_jax.families.idefics3.model import Idefics3Config
from mllm_jax.families.idefics3.processor import Idefics3Processor
from mllm_jax.families.llava import sharding

FAMILY = Family(
    name="idefics3",
    config=Idefics3Config,
    from_hf=functools.partial(config.from_hf, kind=Idefics3Config),
    to_hf=config.to_hf,
    key_table=keys.key_table,
    canonical_key=keys.canonical_key,
    is_unused=keys.is_unused,
    projector_prefix=keys.PROJECTOR_PREFIX,
    sharding_rules=sharding.sharding_rules,
    processor=Idefics3Processor,
    released={
        "idefics3-8b": Idefics3Config.idefics3_8b,
        "smolvlm-256m": Idefics3Config.smolvlm_256m,
        "smolvlm-500m": Idefics3Config.smolvlm_500m,
        "smolvlm-2.2b": Idefics3Config.smolvlm_2b,
    },
)
