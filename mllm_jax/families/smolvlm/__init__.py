"""SmolVLM 2 (Marafioti et al. 2025), on pictures."""

import dataclasses
import functools

from mllm_jax.families import idefics3
from mllm_jax.families.idefics3 import config
from mllm_jax.families.smolvlm.model import SmolVLMConfig

FAMILY = dataclasses.replace(
    idefics3.FAMILY,
    name="smolvlm",
    config=SmolVLMConfig,
    from_hf=functools.partial(config.from_hf, kind=SmolVLMConfig),
    released={
        "smolvlm2-256m": SmolVLMConfig.smolvlm_256m,
        "smolvlm2-500m": SmolVLMConfig.smolvlm_500m,
        "smolvlm2-2.2b": SmolVLMConfig.smolvlm_2b,
    },
)
