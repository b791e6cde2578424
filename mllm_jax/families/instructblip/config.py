"""Convert between the `config.json` of InstructBLIP and its config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder, encoder
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.models.eva import EvaConfig
from mllm_jax.models.qformer import QFormerConfig

# The fields that are read, with the default of transformers.
_BLIP = fields_.TOKEN_IDS | {
    "model_type": (schema.only("instructblip"), "instructblip"),
    "use_decoder_only_language_model": (schema.only(True), True),
    "image_token_index": (schema.optional(schema.ID), None),
    "num_query_tokens": (schema.whole(1, 4096), 32),
    "qformer_config": (schema.PART, None),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
}
_EVA = {
    **encoder.CHANNELS,
    **encoder.table(
        "instructblip_vision_model",
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=39,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    ),
    "qkv_bias": (schema.only(True), True),
}
_QFORMER = {
    **encoder.table(
        "instructblip_qformer",
        vocab_size=30522,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        max_position_embeddings=512,
        layer_norm_eps=1e-12,
    ),
    "position_embedding_type": (schema.only("absolute"), "absolute"),
    "cross_attention_frequency": (schema.LAYERS, 2),
}
# The config of the LM determines whether its head is tied, that of the tower the feature width.
_IGNORED = fields_.IGNORED | {"tie_word_embeddings"}
_QFORMER_IGNORED = _IGNORED | {
    "attention_probs_dropout_prob", "classifier_dropout", "encoder_hidden_size",
    "hidden_dropout_prob",
}  # fmt: skip


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> InstructBlipConfig:
    """Read the config of an InstructBLIP checkpoint; see `from_hf` of LLaVA."""
    problems: list[str] = []
    blip = schema.read(fields_.renamed(fields), _BLIP, _IGNORED, "", problems)
    eva = encoder.read(blip["vision_config"] or {}, _EVA, _IGNORED, "vision_config.", problems)
    bert = encoder.read(
        blip["qformer_config"] or {}, _QFORMER, _QFORMER_IGNORED, "qformer_config.", problems
    )
    # In transformers a text_config without a model_type is an OPT.
    text = decoder.read({"model_type": "opt"} | (blip["text_config"] or {}), problems)
    return fields_.checked(lambda: _config(blip, eva, bert, text), source, problems)


def _config(blip: Mapping, eva: Mapping, bert: Mapping, text: Mapping) -> InstructBlipConfig:
    token = blip["image_token_index"]
    return InstructBlipConfig.of(
        EvaConfig(**encoder.arguments(eva)),
        QFormerConfig(
            **encoder.arguments(bert),
            queries=blip["num_query_tokens"],
            vision_width=eva["hidden_size"],
            look_every=bert["cross_attention_frequency"],
        ),
        decoder.config(text),
        image_token=-1 if token is None else token,
    )


def to_hf(config: InstructBlipConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    vision, qformer = config.vision, config.qformer
    return {
        "model_type": "instructblip",
        "architectures": ["InstructBlipForConditionalGeneration"],
        "image_token_index": None if config.image_token < 0 else config.image_token,
        "num_query_tokens": qformer.queries,
        "use_decoder_only_language_model": True,
        "vision_config": encoder.to_hf(vision, "instructblip_vision_model"),
        "qformer_config": {
            **encoder.to_hf(qformer, "instructblip_qformer"),
            "cross_attention_frequency": qformer.look_every,
            "encoder_hidden_size": qformer.vision_width,
        },
        "text_config": decoder.to_hf(config.lm),
    }
