"""Convert between the `config.json` of Idefics3 or SmolVLM and their config classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder, siglip
from mllm_jax.families.idefics3.model import Idefics3Config

Config = TypeVar("Config", bound=Idefics3Config)

_FIELDS = {
    "image_token_index": (schema.ID, 128257),
    "scale_factor": (schema.whole(1, 64), 2),
    "tie_word_embeddings": (schema.FLAG, False),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
}
_IGNORED = fields_.IGNORED | {  # what follows from other fields, and settings of training
    "_pad_token_id", "image_seq_len", "transformers.js_config", "use_reentrant_checkpointing",
    "vocab_size",
}  # fmt: skip
VISION = siglip.FIELDS | {
    "model_type": (
        schema.only("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision"), "idefics3_vision",
    ),
    "hidden_size": (schema.WIDTH, 1152),
    "num_attention_heads": (schema.HEADS, 16),
    "patch_size": (schema.SIDE, 32),
}  # fmt: skip
_DEFAULT_TEXT = {"rms_norm_eps": 1e-5}  # of transformers without a text_config


def from_hf(fields: Mapping[str, Any], source: object, kind: type[Config]) -> Config:
    """Read the config of a checkpoint of Idefics3 or SmolVLM.

    Args:
      fields: The content of `config.json`.
      source: The name of the file, for the error.
      kind: The config class.

    Raises:
      Refused: There are unknown fields or unsupported values; the message lists all.
    """
    problems: list[str] = []
    table = {"model_type": (schema.only(kind.model_type), kind.model_type), **_FIELDS}
    known = schema.read(fields_.renamed(fields), table, _IGNORED, "", problems)
    vision = siglip.read(known["vision_config"] or {}, problems, VISION)
    text_fields = _DEFAULT_TEXT if known["text_config"] is None else known["text_config"]
    text = decoder.read(text_fields, problems, types=("llama",))
    grid = "vision_config.image_size / patch_size", vision["image_size"] // vision["patch_size"]
    schema.divides(("scale_factor", known["scale_factor"]), grid, problems)

    def make() -> Config:
        # transformers ignores the flag of the language model.
        lm = decoder.config(text, tied=known["tie_word_embeddings"])
        return kind.of(
            siglip.config(vision),
            lm,
            fold=known["scale_factor"],
            image_token=known["image_token_index"],
        )

    return fields_.checked(make, source, problems)


def to_hf(config: Idefics3Config) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[config.model_type]
    return {
        "model_type": config.model_type,
        "architectures": [f"{name}ForConditionalGeneration"],
        "image_token_id": config.image_token,
        "scale_factor": config.projector.fold,
        "tie_word_embeddings": config.lm.tied,
        "vision_config": siglip.to_hf(config.vision, f"{config.model_type}_vision"),
        "text_config": decoder.to_hf(config.lm),
    }
