"""Convert between the `config.json` of PaliGemma and its config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder, siglip
from mllm_jax.families.paligemma.model import PaliGemmaConfig

# The fields that are read, with the default of transformers.
_FIELDS = fields_.TOKEN_IDS | {
    "model_type": (schema.only("paligemma"), "paligemma"),
    "image_token_index": (schema.ID, 256000),
    "projection_dim": (schema.WIDTH, 2048),
    "tie_word_embeddings": (schema.FLAG, True),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
}
_IGNORED = fields_.IGNORED | {"_vocab_size", "hidden_size", "num_image_tokens", "vocab_size"}
_DEFAULT_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 224,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}  # the defaults of transformers without a vision_config
_DEFAULT_GEMMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257152,
}  # the same without a text_config


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> PaliGemmaConfig:
    """Read the config of a PaliGemma checkpoint; see `from_hf` of LLaVA."""
    problems: list[str] = []
    gemma = schema.read(fields_.renamed(fields), _FIELDS, _IGNORED, "", problems)
    tower = siglip.read(gemma["vision_config"] or _DEFAULT_SIGLIP, problems)
    given = dict(gemma["text_config"] or _DEFAULT_GEMMA)
    given.pop("use_bidirectional_attention", None)  # the prompt is always bidirectional
    text = decoder.read(given, problems, types=("gemma", "gemma2"), default="gemma")
    width = text["hidden_size"]
    if gemma["projection_dim"] != width:
        problems.append(
            f"projection_dim={gemma['projection_dim']} is not text_config.hidden_size={width}"
        )
    return fields_.checked(
        lambda: PaliGemmaConfig.of(
            siglip.config(tower),
            decoder.config(text, tied=gemma["tie_word_embeddings"]),
            image_token=gemma["image_token_index"],
        ),
        source,
        problems,
    )


def to_hf(config: PaliGemmaConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    return {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "image_token_index": config.image_token,
        "projection_dim": config.lm.width,
        "hidden_size": config.lm.width,
        "vocab_size": config.lm.vocab,
        "tie_word_embeddings": config.lm.tied,
        "vision_config": siglip.to_hf(config.vision),
        "text_config": decoder.to_hf(config.lm),
    }
