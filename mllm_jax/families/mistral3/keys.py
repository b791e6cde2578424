"""The key table of Mistral 3, and of Pixtral in LLaVA's format, in the spelling of the hub."""

from __future__ import annotations

import re

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, pixtral, projectors
from mllm_jax.families.mistral3.model import Mistral3Config

PROJECTOR_PREFIX = "multi_modal_projector."

_LAYER = re.compile(r"vision_tower\.transformer\.layers\.(\d+)\..*")
_SPELLINGS = (  # the first prefix that fits
    ("model.vision_tower.", "vision_tower."),  # transformers 5
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def key_table(config: Mistral3Config) -> tuple[keys.Row, ...]:
    """Return the key table of a model."""
    rows = projectors.linears if config.projector.norm is None else projectors.merging
    return (
        *pixtral.vision("vision_tower", "vision", config.vision),
        *rows("multi_modal_projector", "projector"),
        *decoder.table(config.lm),
    )


def canonical_key(key: str) -> str:
    """Return the spelling of a key in the table; others as they are."""
    return keys.respell(key.removeprefix(keys.PEFT_PREFIX), _SPELLINGS)


def is_unused(key: str, config: Mistral3Config) -> bool:
    """Return whether a checkpoint may hold this tensor although the model does not use it."""
    if match := _LAYER.fullmatch(key):
        return config.vision.run_layers <= int(match[1]) < config.vision.layers
    return decoder.is_unused(key, config.lm)
