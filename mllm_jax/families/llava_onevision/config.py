"""Convert between the `config.json` of LLaVA-OneVision and its config class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.families.llava import config as llava
from mllm_jax.families.llava_next import config as llava_next
from mllm_jax.families.llava_onevision.model import LlavaOneVisionConfig

_ASPECT_RATIO = re.compile(r"anyres_max_([1-9]\d{0,3})")
_FIELDS = llava.FIELDS | {
    "model_type": (schema.only("llava_onevision"), "llava_onevision"),
    "image_token_index": (schema.ID, 151646),
    "video_token_index": (schema.ID, 151647),  # videos are refused by the processor
    "vision_feature_layer": (schema.whole(-1024, 1024), -1),
    "vision_feature_select_strategy": (schema.only("full"), "full"),
    "vision_aspect_ratio": (
        schema.Kind(
            "'anyres_max_9' and other numbers",
            lambda value: isinstance(value, str) and bool(_ASPECT_RATIO.fullmatch(value)),
        ),
        "anyres_max_9",
    ),
    "image_grid_pinpoints": (fields_.PINPOINTS, None),
}
_DEFAULT_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}  # the defaults of transformers without a vision_config


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> LlavaOneVisionConfig:
    """Read the config of a LLaVA-OneVision checkpoint; see `from_hf` of LLaVA."""
    problems: list[str] = []
    fields = dict(fields)
    if "video_token_id" in fields:  # its name in transformers 5
        fields.setdefault("video_token_index", fields.pop("video_token_id"))
    known = llava.read(fields, _FIELDS, source, problems, tower=_DEFAULT_SIGLIP, text="qwen2")
    if known.tower["model_type"] != "siglip_vision_model":
        problems.append("vision_config.model_type is not supported, only siglip_vision_model")
    tiling = llava_next.pinpoints(known, problems)
    ratio = _ASPECT_RATIO.fullmatch(known.llava["vision_aspect_ratio"])
    return fields_.checked(
        lambda: LlavaOneVisionConfig(
            **llava.parts(known), **tiling, max_tiles=int(ratio[1]) if ratio else 9
        ),
        source,
        problems,
    )


def to_hf(config: LlavaOneVisionConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    return {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": [list(size) for size in config.pinpoints],
        "vision_aspect_ratio": f"anyres_max_{config.max_tiles}",
        **llava.parts_to_hf(config),
    }
