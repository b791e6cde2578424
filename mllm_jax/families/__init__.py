"""The registry of families: a family is a folder here, and one line of `_FOLDERS`.

All code outside of the folders finds a family through this module, by the `model_type` of a
checkpoint, by a config, or by the name of a released model.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax import files
from mllm_jax.families.base import Family, OriginalLayout
from mllm_jax.models.multimodal import MultimodalConfig

_FOLDERS = (
    "llava",
    "llava_next",
    "llava_onevision",
    "paligemma",
    "instructblip",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "gemma3",
    "gemma3_text",
    "internvl",
    "idefics3",
    "smolvlm",
    "mistral3",
    "llava_pixtral",
)

_MODULES = (importlib.import_module(f"{__name__}.{folder}") for folder in _FOLDERS)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
RELEASED: dict[str, Callable[[], MultimodalConfig]] = {
    name: config for family in FAMILIES.values() for name, config in family.released.items()
}
_OTHER_LAYOUTS = {
    name: hint for family in FAMILIES.values() for name, hint in family.other_layouts.items()
}
ORIGINAL_LAYOUTS: tuple[OriginalLayout, ...] = tuple(
    {id(f.original): f.original for f in FAMILIES.values() if f.original is not None}.values()
)


def of(config: MultimodalConfig) -> Family:
    """Return the family of a config."""
    return next(family for family in FAMILIES.values() if family.config is type(config))


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> MultimodalConfig:
    """Return the config of a checkpoint of any family.

    Args:
      fields: The content of `config.json`.
      source: The name of the file, for the error.

    Raises:
      ValueError: No family has this `model_type`, or the fields are not those of a known model.
    """
    for family in FAMILIES.values():
        if family.reads is not None and family.reads(fields):
            return family.from_hf(fields, source)
    name = fields.get("model_type", "llava")
    if not isinstance(name, str) or name not in FAMILIES:
        instead = _OTHER_LAYOUTS.get(name) if isinstance(name, str) else None
        instead = f"load {instead}" if instead else f"only {', '.join(FAMILIES)}"
        problem = f"model_type={files.shown(name)} is not supported, {instead}"
        raise ValueError(files.refusal(source, [problem]))
    return FAMILIES[name].from_hf(fields, source)


def original_layout(fields: Mapping[str, Any]) -> OriginalLayout | None:
    """Return the original layout that a `config.json` has; None for that of transformers."""
    return next((layout for layout in ORIGINAL_LAYOUTS if layout.is_original(fields)), None)


def nearest(name: str) -> list[str]:
    """Return the names of released models most similar to a name; all if none is similar."""
    return difflib.get_close_matches(name.lower(), RELEASED, n=3, cutoff=0.5) or list(RELEASED)
