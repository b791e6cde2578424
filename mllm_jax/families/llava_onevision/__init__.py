"""LLaVA-OneVision (Li et al. 2024)."""

import dataclasses

from mllm_jax.families import llava_next
from mllm_jax.families.llava_onevision import config
from mllm_jax.families.llava_onevision.model import LlavaOneVisionConfig
from mllm_jax.families.llava_onevision.processor import LlavaOneVisionProcessor

FAMILY = dataclasses.replace(
    llava_next.FAMILY,
    name="llava_onevision",
    config=LlavaOneVisionConfig,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    processor=LlavaOneVisionProcessor,
    released={
        "llava-onevision-0.5b": LlavaOneVisionConfig.qwen2_0_5b,
        "llava-onevision-7b": LlavaOneVisionConfig.qwen2_7b,
        "llava-onevision-72b": LlavaOneVisionConfig.qwen2_72b,
    },
    original=None,
)
