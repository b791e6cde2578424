"""The key table of LLaVA, and the spellings of its keys.

The canonical spelling is that of the LLaVA files on the hub, which transformers 4 and 5 both read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from mllm_jax import files
from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, projectors, square_towers
from mllm_jax.families.llava.model import Llava, LlavaConfig

PROJECTOR_PREFIX = "multi_modal_projector."


def key_table(config: LlavaConfig) -> tuple[keys.Row, ...]:
    """Return the key table of a LLaVA model."""
    return (
        *square_towers.table(config.vision, "vision_tower.vision_model", "vision"),
        *projectors.linears("multi_modal_projector", "projector", config.projector.depth),
        *decoder.table(config.lm),
    )


_SPELLINGS = (  # the first prefix that fits
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),  # original
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),  # late transformers 4
    ("model.vision_tower.", "vision_tower.vision_model."),  # transformers 5 in memory
    ("vision_tower.vision_model.", "vision_tower.vision_model."),  # the hub
    ("vision_tower.", "vision_tower.vision_model."),  # transformers 5 on disk
    ("model.image_newline", "image_newline"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),  # original
)
_ORIGINAL_PROJECTOR = re.compile(r"(?:.+\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
_WRAPPED_PROJECTOR = re.compile(r".+\.((?:multi_modal_projector|language_projection)\..*)")
_PROJECTOR = re.compile(r"multi_modal_projector\.linear_(\d+)\.(weight|bias)")
_TOWER = re.compile(r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)")
_OF_TEXT = re.compile(r"text_model\..*|(text_projection|visual_projection)\.weight|logit_scale")


def canonical_key(key: str) -> str:
    """Return the canonical spelling of a Hugging Face or original key; others are returned as is.

    The original code (Liu et al. 2023) numbers the modules of its projector, activations included:
    `model.mm_projector.0`, `.2`, or no number for a single linear map. Training code may have put
    a prefix before the keys.
    """
    key = key.removeprefix(keys.PEFT_PREFIX)
    if match := _ORIGINAL_PROJECTOR.fullmatch(key):
        number, kind = match.groups()
        return f"multi_modal_projector.linear_{int(number or 0) // 2 + 1}.{kind}"
    if match := _WRAPPED_PROJECTOR.fullmatch(key):
        return match[1]
    return keys.respell(key, _SPELLINGS)


def original_projector_keys(projector: Iterable[str]) -> dict[str, str]:
    """Return canonical key -> key in the original code for the tensors of a projector."""
    matches = {key: _PROJECTOR.fullmatch(key) for key in projector}
    if other := [key for key, match in matches.items() if not match]:
        raise ValueError(f"the original LLaVA code has no name for {files.some(other)}")
    parts = {key: match.groups() for key, match in matches.items() if match}
    single = {number for number, _ in parts.values()} == {"1"}
    return {
        key: f"model.mm_projector.{kind if single else f'{2 * int(number) - 2}.{kind}'}"
        for key, (number, kind) in parts.items()
    }


def tower_key(key: str) -> str | None:
    """Return the canonical spelling of a key of a CLIP checkpoint; None for unused tensors."""
    if match := _TOWER.fullmatch(key):
        return f"vision_tower.vision_model.{match[1]}"
    return None if _OF_TEXT.fullmatch(key) else key


_VISION_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\..*")
_POST_NORM = "vision_tower.vision_model.post_layernorm."
_SIGLIP_HEAD = "vision_tower.vision_model.head."


def is_unused(key: str, config: LlavaConfig) -> bool:
    """Return whether a checkpoint may hold this tensor although the model does not use it.

    True for buffers, for parameters after the vision layer whose output is used, and for the second
    copy of a tied embedding.

    Args:
      key: The key in canonical spelling.
      config: The config of the model.
    """
    if match := _VISION_LAYER.fullmatch(key):
        return config.vision.run_layers <= int(match[1]) < config.vision.layers
    return key.startswith((_POST_NORM, _SIGLIP_HEAD)) or decoder.is_unused(key, config.lm)


def unused_tensors(model: Llava) -> dict[str, np.ndarray]:
    """Return the final norm of the vision tower, unused here and expected by transformers."""
    width, dtype = model.config.vision.width, model.dtype
    ones, zeros = np.ones(width, dtype), np.zeros(width, dtype)
    return {f"{_POST_NORM}weight": ones, f"{_POST_NORM}bias": zeros}
