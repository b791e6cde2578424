"""The released models by name: their configs, without any weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.families.llava_next.model import LlavaNextConfig

RELEASED: dict[str, Callable[[], LlavaConfig]] = {
    "embedded": LlavaConfig.embedded,
    "llava-1.5-7b": LlavaConfig.llava_1_5_7b,
    "llava-1.5-13b": LlavaConfig.llava_1_5_13b,
    "llava-next-vicuna-7b": LlavaNextConfig.vicuna_7b,
    "llava-next-vicuna-13b": LlavaNextConfig.vicuna_13b,
    "llava-next-mistral-7b": LlavaNextConfig.mistral_7b,
    "instructblip-vicuna-7b": InstructBlipConfig.vicuna_7b,
}


def nearest(name: str) -> list[str]:
    """The names most like this one; all of them where none is like it."""
    return difflib.get_close_matches(name.lower(), RELEASED, n=3, cutoff=0.5) or list(RELEASED)
