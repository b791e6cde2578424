"""The key table of Gemma 3."""

from __future__ import annotations

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, projectors, siglip
from mllm_jax.families.gemma3.model import Gemma3Config

PROJECTOR_PREFIX = "multi_modal_projector."
_TOWER = "vision_tower.vision_model"


def key_table(config: Gemma3Config) -> tuple[keys.Row, ...]:
    """Return the key table of a Gemma 3 model, in the spelling of the hub."""
    vision = siglip.vision(_TOWER, "vision")
    projector = projectors.pooled("multi_modal_projector", "projector")
    return (*vision, *projector, *decoder.table(config.lm))


def is_unused(key: str, config: Gemma3Config) -> bool:
    """Return whether a tensor is a buffer, of the tower's head, or a copy of a tied embedding."""
    return key.startswith(f"{_TOWER}.head.") or decoder.is_unused(key, config.lm)
