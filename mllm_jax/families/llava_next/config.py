"""Convert between the `config.json` of LLaVA-NeXT and its config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax import files
from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.families.llava import config as llava
from mllm_jax.families.llava_next.model import LlavaNextConfig

_MAX_TILES = 16  # along a side of an image
_FIELDS = llava.FIELDS | {
    "model_type": (schema.only("llava_next"), "llava_next"),
    "vision_feature_select_strategy": (schema.only("default"), "default"),
    "use_image_newline_parameter": (schema.only(True), True),
    "image_grid_pinpoints": (fields_.PINPOINTS, None),
}


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> LlavaNextConfig:
    """Read the config of a LLaVA-NeXT checkpoint; see `from_hf` of LLaVA."""
    problems: list[str] = []
    known = llava.read(fields, _FIELDS, source, problems)
    tiling = pinpoints(known, problems)
    return fields_.checked(
        lambda: LlavaNextConfig(**llava.parts(known), **tiling), source, problems
    )


def to_hf(config: LlavaNextConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    return {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": [list(size) for size in config.pinpoints],
        "use_image_newline_parameter": True,
        **llava.parts_to_hf(config),
    }


def pinpoints(known: llava.Fields, problems: list[str]) -> dict[str, Any]:
    """Return the field of LlavaNextConfig; empty if the config has none."""
    given, side = known.llava["image_grid_pinpoints"], known.tower["image_size"]
    if given is None:
        return {}
    if any(n % side or n > _MAX_TILES * side for pair in given for n in pair):
        problems.append(
            f"image_grid_pinpoints={files.shown(given)} is not supported, only pairs of multiples "
            f"of vision_config.image_size={side}, up to {_MAX_TILES} times"
        )
    return {"pinpoints": tuple(map(tuple, given))}
