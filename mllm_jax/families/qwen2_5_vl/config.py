"""Convert between the `config.json` of the Qwen-VL models and their config classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder, qwen_vision
from mllm_jax.families.qwen2_5_vl.model import QwenVLConfig

Config = TypeVar("Config", bound=QwenVLConfig)

_FIELDS = {
    "image_token_id": (schema.ID, 151655),
    "tie_word_embeddings": (schema.FLAG, False),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
}
_IGNORED = fields_.IGNORED | {  # of video, and ids that the processor writes
    "video_token_id", "vision_end_token_id", "vision_start_token_id", "vision_token_id",
}  # fmt: skip
_TEXT = {"2": "qwen2_vl_text", "2.5": "qwen2_5_vl_text", "3": "qwen3_vl_text"}


def from_hf(fields: Mapping[str, Any], source: object, kind: type[Config]) -> Config:
    """Read the config of a checkpoint of a Qwen-VL model.

    Args:
      fields: The content of `config.json`. The first checkpoints of Qwen2-VL and Qwen2.5-VL have
        the fields of the language model at its root.
      source: The name of the file, for the error.
      kind: The config class.

    Raises:
      Refused: There are unknown fields or unsupported values; the message lists all.
    """
    problems: list[str] = []
    version, default = kind.version, _TEXT[kind.version]
    table = {"model_type": (schema.only(model_type(kind)), model_type(kind)), **_FIELDS}
    nested = "text_config" in fields and fields["text_config"] is not None
    whole, text_fields = decoder.nested(fields, default)
    whole = schema.read(whole, table, _IGNORED, "", problems)
    text = decoder.read(
        text_fields,
        problems,
        types=(default,),
        default=default,
        prefix="text_config." if nested else "",
    )
    vision = qwen_vision.read(whole["vision_config"] or {}, version, problems)
    out = vision["hidden_size" if version == "2" else "out_hidden_size"]
    if out != text["hidden_size"]:
        problems.append(
            f"vision_config leads to tokens of width {out}, but the language model reads "
            f"hidden_size={text['hidden_size']}"
        )
    tied = whole["tie_word_embeddings"]
    if version != "3":  # transformers reads either flag
        tied = tied or text["tie_word_embeddings"]

    def make() -> Config:
        tower = qwen_vision.config(vision, version)
        lm = decoder.config(text, tied=tied)
        return kind.of(tower, lm, image_token=whole["image_token_id"])

    return fields_.checked(make, source, problems)


def to_hf(config: QwenVLConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    name = {"2": "Qwen2VL", "2.5": "Qwen2_5_VL", "3": "Qwen3VL"}[config.version]
    return {
        "model_type": model_type(type(config)),
        "architectures": [f"{name}ForConditionalGeneration"],
        "image_token_id": config.image_token,
        "tie_word_embeddings": config.lm.tied,
        "vision_config": qwen_vision.to_hf(config.vision, config.version, config.lm.width),
        "text_config": decoder.to_hf(config.lm) | {"model_type": _TEXT[config.version]},
    }


def model_type(kind: type[QwenVLConfig]) -> str:
    """Return the `model_type` of a config class."""
    return _TEXT[kind.version].removesuffix("_text")
