"""Qwen2.5-VL (Bai et al. 2025), and the code that it shares with the other Qwen-VL families."""

import functools

from mllm_jax.families.base import Family
from mllm_jax.families.qwen2_5_vl import config, keys, sharding
from mllm_jax.families.qwen2_5_vl.model import QwenVLConfig
from mllm_jax.families.qwen2_5_vl.processor import QwenVLProcessor

FAMILY = Family(
    name="qwen2_5_vl",
    config=QwenVLConfig,
    from_hf=functools.partial(config.from_hf, kind=QwenVLConfig),
    to_hf=config.to_hf,
    key_table=keys.key_table,
    canonical_key=keys.canonical_key,
    is_unused=keys.is_unused,
    projector_prefix=keys.PROJECTOR_PREFIX,
    sharding_rules=sharding.sharding_rules,
    processor=QwenVLProcessor,
    released={
        "qwen2.5-vl-3b": QwenVLConfig.qwen2_5_vl_3b,
        "qwen2.5-vl-7b": QwenVLConfig.qwen2_5_vl_7b,
        "qwen2.5-vl-32b": QwenVLConfig.qwen2_5_vl_32b,
        "qwen2.5-vl-72b": QwenVLConfig.qwen2_5_vl_72b,
    },
)
