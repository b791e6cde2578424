"""The key table of Qwen3-VL, and the spellings of its keys."""

from __future__ import annotations

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, projectors, qwen_vision
from mllm_jax.families.qwen2_5_vl import keys as qwen
from mllm_jax.families.qwen3_vl.model import Qwen3VLConfig

VISION, LM = "model.visual", "model.language_model"
PROJECTOR_PREFIX = (f"{VISION}.merger.", f"{VISION}.deepstack_merger_list.")

_SPELLINGS = ((f"{qwen.VISION}.", f"{VISION}."), (f"{qwen.LM}.", f"{LM}."))  # of Qwen2-VL and here


def key_table(config: Qwen3VLConfig) -> tuple[keys.Row, ...]:
    """Return the key table of a Qwen3-VL model."""
    return (
        *qwen_vision.vision(VISION, "vision", config.vision),
        *projectors.qwen3(VISION, "projector"),
        *decoder.table(config.lm, LM, qwen.HEAD),
    )


def canonical_key(key: str) -> str:
    """Return the canonical spelling of a key; others as they are."""
    return keys.respell(qwen.canonical_key(key), _SPELLINGS)
