"""InstructBLIP (Dai et al. 2023)."""

from mllm_jax.families.base import Family
from mllm_jax.families.instructblip import config, keys, sharding
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.instructblip.processor import InstructBlipProcessor
from mllm_jax.families.llava.keys import canonical_key

FAMILY = Family(
    name="instructblip",
    config=InstructBlipConfig,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    key_table=keys.key_table,
    canonical_key=canonical_key,
    is_unused=keys.is_unused,
    projector_prefix=keys.PROJECTOR_PREFIX,
    sharding_rules=sharding.sharding_rules,
    processor=InstructBlipProcessor,
    released={"instructblip-vicuna-7b": InstructBlipConfig.vicuna_7b},
)
