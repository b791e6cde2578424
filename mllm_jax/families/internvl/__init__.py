"""InternVL 3 and 3.5 (Zhu et al. 2025, Wang et al. 2025)."""

import functools

from mllm_jax.families.base import Family
from mllm_jax.families.internvl import config, keys
from mllm_jax.families.internvl.model import InternVlConfig, version_3, version_3_5, with_6b
from mllm_jax.families.internvl.processor import InternVlProcessor
from mllm_jax.families.llava.sharding import sharding_rules

FAMILY = Family(
    name="internvl",
    config=InternVlConfig,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    key_table=keys.key_table,
    canonical_key=keys.canonical_key,
    is_unused=keys.is_unused,
    projector_prefix=keys.PROJECTOR_PREFIX,
    sharding_rules=sharding_rules,
    processor=InternVlProcessor,
    other_layouts={"internvl_chat": "the conversion to transformers, such as InternVL3-8B-hf"},
    released={
        "internvl3-1b": functools.partial(
            version_3, width=896, layers=24, heads=14, kv_heads=2, head_width=64, mlp=4864
        ),
        "internvl3-2b": functools.partial(
            version_3, width=1536, layers=28, heads=12, kv_heads=2, mlp=8960
        ),
        "internvl3-8b": version_3,
        "internvl3-14b": functools.partial(
            version_3, width=5120, layers=48, heads=40, kv_heads=8, mlp=13824
        ),
        "internvl3-38b": lambda: with_6b(
            version_3(width=5120, layers=64, heads=40, kv_heads=8, mlp=27648)
        ),
        "internvl3.5-1b": functools.partial(version_3_5, width=1024, layers=28, heads=16, mlp=3072),
        "internvl3.5-2b": functools.partial(version_3_5, width=2048, layers=28, heads=16, mlp=6144),
        "internvl3.5-4b": functools.partial(version_3_5, width=2560, layers=36, heads=32, mlp=9728),
        "internvl3.5-8b": functools.partial(
            version_3_5, width=4096, layers=36, heads=32, mlp=12288
        ),
        "internvl3.5-14b": functools.partial(
            version_3_5, width=5120, layers=40, heads=40, mlp=17408
        ),
    },
)
