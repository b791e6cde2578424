"""The key table of Idefics3 and SmolVLM, in the spelling of the files on the hub."""

from __future__ import annotations

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, siglip
from mllm_jax.families.idefics3.model import Idefics3Config

PROJECTOR_PREFIX = "model.connector."
_LM, _HEAD = "model.text_model", "lm_head"


def key_table(config: Idefics3Config) -> tuple[keys.Row, ...]:
    """Return the key table of an Idefics3 model."""
    return (
        *siglip.vision("model.vision_model", "vision"),
        *projector("model.connector", "projector"),
        *decoder.table(config.lm, _LM, _HEAD),
    )


def projector(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of the linear map after the pixel shuffle."""
    return keys.rows(hf, ours, *keys.linear("modality_projection.proj", "linears.0"))


def canonical_key(key: str) -> str:
    """Return a key without the prefix of an adapter; there is one spelling."""
    return key.removeprefix(keys.PEFT_PREFIX)


def is_unused(key: str, config: Idefics3Config) -> bool:
    """Return whether a checkpoint may hold this tensor although the model does not use it."""
    return decoder.is_unused(key, config.lm, _HEAD)
