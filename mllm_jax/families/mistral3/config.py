"""Convert between the `config.json` of Mistral 3 and its config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder, encoder, pixtral
from mllm_jax.families.mistral3.model import Mistral3Config

Config = TypeVar("Config", bound=Mistral3Config)

FIELDS = {
    "model_type": (schema.only("mistral3"), "mistral3"),
    "image_token_index": (schema.ID, 10),
    "projector_hidden_act": (fields_.ACTIVATION, "gelu"),
    "vision_feature_layer": (schema.whole(-1024, 1024), -1),
    "multimodal_projector_bias": (schema.FLAG, False),
    "spatial_merge_size": (schema.whole(1, 64), 2),
    "tie_word_embeddings": (schema.FLAG, True),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
}
_IGNORED = fields_.IGNORED | {"vision_feature_select_strategy"}  # which this family does not have
_DEFAULT_TEXT = {  # of transformers without a text_config
    "head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e9,
    "sliding_window": None, "vocab_size": 131072,
}  # fmt: skip
_DEFAULT_VISION = {"image_size": 1540, "patch_size": 14}  # without a vision_config


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> Mistral3Config:
    """Read the config of a checkpoint of Mistral 3.

    Args:
      fields: The content of `config.json`.
      source: The name of the file, for the error.

    Raises:
      Refused: There are unknown fields or unsupported values; the message lists all.
    """
    problems: list[str] = []
    known = schema.read(fields_.renamed(fields), FIELDS, _IGNORED, "", problems)
    default = _DEFAULT_TEXT if known["text_config"] is None else {}
    text = decoder.read(
        default | (known["text_config"] or {}),
        problems,
        types=("mistral", "llama"),
        default="mistral",
    )
    vision = known["vision_config"] or _DEFAULT_VISION
    return read(Mistral3Config, known, vision, text, source, problems)


def read(
    kind: type[Config],
    known: Mapping[str, Any],
    vision_fields: Mapping[str, Any],
    text: Mapping[str, Any],
    source: object,
    problems: list[str],
) -> Config:
    """Return the config of fields that are read.

    Args:
      kind: The config class.
      known: The fields of the whole model.
      vision_fields: The content of the `vision_config`.
      text: The fields of the language model, read.
      source: The name of the file, for the error.
      problems: What is wrong with the fields.

    Raises:
      Refused: There are problems.
    """
    vision = pixtral.read(vision_fields, problems)
    at, merge = known["vision_feature_layer"], known.get("spatial_merge_size", 1)
    encoder.check_feature_layer(vision, at, problems)

    def make() -> Config:
        return kind.of(
            pixtral.config(vision, merge=merge, feature_layer=at),
            decoder.config(text, tied=known["tie_word_embeddings"]),
            act=fields_.ACTIVATIONS[known["projector_hidden_act"]],
            bias=known["multimodal_projector_bias"],
            image_token=known["image_token_index"],
        )

    return fields_.checked(make, source, problems)


def to_hf(config: Mistral3Config) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    return {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "spatial_merge_size": config.merge,
        **parts_to_hf(config),
    }


def parts_to_hf(config: Mistral3Config) -> dict[str, Any]:
    """Return the fields that Mistral 3 shares with Pixtral in LLaVA's format."""
    return {
        "image_token_index": config.image_token,
        "projector_hidden_act": fields_.HF_ACTIVATIONS[config.projector.act],
        "multimodal_projector_bias": config.projector.bias,
        "vision_feature_layer": -1,
        "tie_word_embeddings": config.lm.tied,
        "vision_config": pixtral.to_hf(config.vision),
        "text_config": decoder.to_hf(config.lm),
    }
