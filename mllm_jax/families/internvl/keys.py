"""The key table of InternVL, and the spellings of its keys."""

from __future__ import annotations

import re

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, internvit, projectors
from mllm_jax.families.internvl.model import InternVlConfig
from mllm_jax.families.llava.keys import PROJECTOR_PREFIX
from mllm_jax.families.llava.keys import canonical_key as llava_key

__all__ = ["PROJECTOR_PREFIX", "canonical_key", "is_unused", "key_table"]

_TOWER = "vision_tower"
_LAYER = re.compile(rf"{_TOWER}\.encoder\.layer\.(\d+)\..*")


def key_table(config: InternVlConfig) -> tuple[keys.Row, ...]:
    """Return the key table of an InternVL model, in the spelling of the hub."""
    return (
        *internvit.vision(_TOWER, "vision"),
        *projectors.shuffled("multi_modal_projector", "projector"),
        *decoder.table(config.lm),
    )


def canonical_key(key: str) -> str:
    """Return the canonical spelling of a key; only those of the tower differ from LLaVA's."""
    return llava_key(key).replace(f"{_TOWER}.vision_model.", f"{_TOWER}.", 1)


def is_unused(key: str, config: InternVlConfig) -> bool:
    """Return whether a tensor is a buffer, above the layer that is read, or a copy of another."""
    if match := _LAYER.fullmatch(key):
        return config.vision.run_layers <= int(match[1]) < config.vision.layers
    is_norm = key.startswith(f"{_TOWER}.layernorm.") and not config.vision.has_norm
    return is_norm or decoder.is_unused(key, config.lm)
