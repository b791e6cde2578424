"""PaliGemma (Beyer et al. 2024) and PaliGemma 2 (Steiner et al. 2024)."""

from mllm_jax.families.base import Family
from mllm_jax.families.llava import keys as llava_keys
from mllm_jax.families.llava import sharding
from mllm_jax.families.paligemma import config, keys
from mllm_jax.families.paligemma.model import PaliGemmaConfig
from mllm_jax.families.paligemma.processor import PaliGemmaProcessor

FAMILY = Family(
    name="paligemma",
    config=PaliGemmaConfig,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    key_table=keys.key_table,
    canonical_key=llava_keys.canonical_key,
    is_unused=keys.is_unused,
    projector_prefix=llava_keys.PROJECTOR_PREFIX,
    sharding_rules=sharding.sharding_rules,
    processor=PaliGemmaProcessor,
    released={
        "paligemma-3b": PaliGemmaConfig.gemma_2b,
        "paligemma2-3b": PaliGemmaConfig.gemma2_2b,
        "paligemma2-10b": PaliGemmaConfig.gemma2_9b,
        "paligemma2-28b": PaliGemmaConfig.gemma2_27b,
    },
)
