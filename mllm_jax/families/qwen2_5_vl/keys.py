"""The key tables of the Qwen-VL models, and the spellings of their keys.

The canonical spelling is that of the files on the hub: `visual.` and `model.` in Qwen2-VL and
Qwen2.5-VL, `model.visual.` and `model.language_model.` in Qwen3-VL.
"""

from __future__ import annotations

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, projectors, qwen_vision
from mllm_jax.families.qwen2_5_vl.model import QwenVLConfig

VISION, LM, HEAD = "visual", "model", "lm_head"
PROJECTOR_PREFIX = f"{VISION}.merger."

_SPELLINGS = (  # the first prefix that matches, and its form in Qwen2-VL
    ("model.visual.", "visual."),  # transformers in memory, and late files
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def key_table(config: QwenVLConfig) -> tuple[keys.Row, ...]:
    """Return the key table of a Qwen2-VL or Qwen2.5-VL model."""
    return (
        *qwen_vision.vision(VISION, "vision", config.vision),
        *projectors.qwen2(VISION, "projector"),
        *decoder.table(config.lm, LM, HEAD),
    )


def canonical_key(key: str) -> str:
    """Return the canonical spelling of a key of Qwen2-VL or Qwen2.5-VL; others as they are."""
    return keys.respell(key.removeprefix(keys.PEFT_PREFIX), _SPELLINGS)


def is_unused(key: str, config: QwenVLConfig) -> bool:
    """Return whether a checkpoint may hold this tensor although the model does not use it."""
    return decoder.is_unused(key, config.lm, HEAD)
