"""Convert between the `config.json` of Pixtral in LLaVA's format and its config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder
from mllm_jax.families.llava import config as llava
from mllm_jax.families.llava_pixtral.model import LlavaPixtralConfig
from mllm_jax.families.mistral3 import config as mistral3

_FIELDS = {
    name: field for name, field in llava.FIELDS.items() if not name.startswith("projector_")
} | {
    "projector_hidden_act": llava.FIELDS["projector_hidden_act"],
    # Another strategy, such as the default, would drop the first patch.
    "vision_feature_select_strategy": (schema.only("full"), "default"),
}


def is_pixtral(fields: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` is of a LLaVA with Pixtral's tower."""
    vision = fields.get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, Mapping) else None
    return fields.get("model_type", "llava") == "llava" and kind == "pixtral"


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> LlavaPixtralConfig:
    """Read the config of a checkpoint; see `from_hf` of Mistral 3."""
    problems: list[str] = []
    known = schema.read(fields_.renamed(fields), _FIELDS, fields_.IGNORED, "", problems)
    text = decoder.read(known["text_config"] or {}, problems, types=llava.TEXT_TYPES)
    known["tie_word_embeddings"] = known["tie_word_embeddings"] or text["tie_word_embeddings"]
    vision = known["vision_config"] or {}
    return mistral3.read(LlavaPixtralConfig, known, vision, text, source, problems)


def to_hf(config: LlavaPixtralConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_feature_select_strategy": "full",
        **mistral3.parts_to_hf(config),
    }
