"""Qwen2-VL (Wang et al. 2024)."""

import dataclasses
import functools

from mllm_jax.families import qwen2_5_vl
from mllm_jax.families.qwen2_5_vl import config
from mllm_jax.families.qwen2_vl.model import Qwen2VLConfig

FAMILY = dataclasses.replace(
    qwen2_5_vl.FAMILY,
    name="qwen2_vl",
    config=Qwen2VLConfig,
    from_hf=functools.partial(config.from_hf, kind=Qwen2VLConfig),
    released={
        "qwen2-vl-2b": Qwen2VLConfig.qwen2_vl_2b,
        "qwen2-vl-7b": Qwen2VLConfig.qwen2_vl_7b,
        "qwen2-vl-72b": Qwen2VLConfig.qwen2_vl_72b,
    },
)
