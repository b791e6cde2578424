"""Pixtral (Agrawal et al. 2024) in the format of LLaVA, as converted to transformers."""

import dataclasses

from mllm_jax.families import mistral3
from mllm_jax.families.llava_pixtral import config
from mllm_jax.families.llava_pixtral.model import LlavaPixtralConfig

FAMILY = dataclasses.replace(
    mistral3.FAMILY,
    name="llava_pixtral",
    config=LlavaPixtralConfig,
    reads=config.is_pixtral,
    from_hf=config.from_hf,
    to_hf=config.to_hf,
    released={"pixtral-12b": LlavaPixtralConfig.pixtral_12b},
)
