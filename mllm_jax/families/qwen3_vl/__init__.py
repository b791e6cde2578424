"""Qwen3-VL, dense."""

import dataclasses
import functools

from mllm_jax.families import qwen2_5_vl
from mllm_jax.families.qwen2_5_vl import config
from mllm_jax.families.qwen3_vl import keys
from mllm_jax.families.qwen3_vl.model import Qwen3VLConfig

FAMILY = dataclasses.replace(
    qwen2_5_vl.FAMILY,
    name="qwen3_vl",
    config=Qwen3VLConfig,
    from_hf=functools.partial(config.from_hf, kind=Qwen3VLConfig),
    key_table=keys.key_table,
    canonical_key=keys.canonical_key,
    projector_prefix=keys.PROJECTOR_PREFIX,
    released={
        "qwen3-vl-2b": Qwen3VLConfig.qwen3_vl_2b,
        "qwen3-vl-4b": Qwen3VLConfig.qwen3_vl_4b,
        "qwen3-vl-8b": Qwen3VLConfig.qwen3_vl_8b,
        "qwen3-vl-32b": Qwen3VLConfig.qwen3_vl_32b,
    },
)
