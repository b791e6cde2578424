"""The key table of PaliGemma; its keys are spelled like LLaVA's."""

from __future__ import annotations

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, projectors, siglip
from mllm_jax.families.paligemma.model import PaliGemmaConfig

_TOWER = "vision_tower.vision_model"


def key_table(config: PaliGemmaConfig) -> tuple[keys.Row, ...]:
    """Return the key table of a PaliGemma model."""
    return (
        *siglip.vision(_TOWER, "vision"),
        *projectors.linear("multi_modal_projector", "projector"),
        *decoder.table(config.lm),
    )


def is_unused(key: str, config: PaliGemmaConfig) -> bool:
    """Return whether a checkpoint may hold this tensor although the model does not use it."""
    return key.startswith(f"{_TOWER}.head.") or decoder.is_unused(key, config.lm)
