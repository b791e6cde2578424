"""A tiny config of every family, and its processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mllm_jax import families
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.siglip import SiglipConfig
from mllm_jax.processors.processor import Processor
from tests.helpers import gemma, idefics3, internvl, pixtral, qwen, tiny


def _with_lm(config: MultimodalConfig, **fields: Any) -> MultimodalConfig:
    return dataclasses.replace(config, lm=dataclasses.replace(config.lm, **fields))


_TINY = {name: family.config.tiny() for name, family in families.FAMILIES.items()}
CONFIGS = _TINY | {
    # With neurons that leave no two words equally likely.
    "qwen3_vl": _with_lm(_TINY["qwen3_vl"], mlp=56),
    "siglip_qwen2": LlavaConfig.of(  # without the norm after the tower, as every LLaVA
        dataclasses.replace(SiglipConfig.tiny(), feature_layer=-1),
        dataclasses.replace(DecoderConfig.tiny(), biases="qkv", tied=True),
        image_token=95,
    ),
}
_PROCESSORS: dict[str, Callable[[Any], Processor]] = {
    "instructblip": tiny.instructblip_processor,
    "gemma3": gemma.processor,
    "gemma3_text": gemma.text_processor,
    "internvl": internvl.processor,
    "qwen2_5_vl": qwen.processor,
    "qwen2_vl": qwen.processor,
    "qwen3_vl": qwen.processor,
    "idefics3": idefics3.processor,
    "smolvlm": idefics3.processor,
    "mistral3": pixtral.processor,
    "llava_pixtral": pixtral.processor,
}


def processor(name: str) -> Processor:
    """The processor of a tiny config."""
    return _PROCESSORS.get(name, tiny.processor)(CONFIGS[name])
