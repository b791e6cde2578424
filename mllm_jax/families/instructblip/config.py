"""Convert between the `config.json` of InstructBLIP and its config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import clip, llama
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
_EVA = clip.TOWER | {
    "model_type": (schema.only("instructblip_vision_model"), "instructblip_vision_model"),
    "hidden_size": (schema.WIDTH, 1408),
    "intermediate_size": (schema.WIDTH, 6144),
    "num_hidden_layers": (schema.LAYERS, 39),
    "num_attention_heads": (schema.HEADS, 16),
    "patch_size": (schema.SIDE, 14),
    "hidden_act": (fields_.ACTIVATION, "gelu"),
    "layer_norm_eps": (schema.EPSILON, 1e-6),
    "qkv_bias": (schema.only(True), True),
}
_QFORMER = {
    "model_type": (schema.only("instructblip_qformer"), "instructblip_qformer"),
    "position_embedding_type": (schema.only("absolute"), "absolute"),
    "vocab_size": (schema.WORDS, 30522),
    "hidden_size": (schema.WIDTH, 768),
    "num_hidden_layers": (schema.LAYERS, 12),
    "num_attention_heads": (schema.HEADS, 12),
    "intermediate_size": (schema.WIDTH, 3072),
    "hidden_act": (fields_.ACTIVATION, "gelu"),
    "max_position_embeddings": (schema.whole(1, 2**20), 512),
    "layer_norm_eps": (schema.EPSILON, 1e-12),
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
    eva = schema.read(blip["vision_config"] or {}, _EVA, _IGNORED, "vision_config.", problems)
    clip.check_tower(eva, problems)
    bert = schema.read(
        blip["qformer_config"] or {}, _QFORMER, _QFORMER_IGNORED, "qformer_config.", problems
    )
    heads = "num_attention_heads", bert["num_attention_heads"]
    schema.divides(heads, ("qformer_config.hidden_size", bert["hidden_size"]), problems)
    # In transformers a text_config without a model_type is an OPT.
    text = llama.read({"model_type": "opt"} | (blip["text_config"] or {}), problems)
    return fields_.checked(lambda: _config(blip, eva, bert, text), source, problems)


def _config(blip: Mapping, eva: Mapping, bert: Mapping, text: Mapping) -> InstructBlipConfig:
    token = blip["image_token_index"]
    return InstructBlipConfig.of(
        EvaConfig(
            width=eva["hidden_size"],
            layers=eva["num_hidden_layers"],
            heads=eva["num_attention_heads"],
            mlp=eva["intermediate_size"],
            image_size=eva["image_size"],
            patch=eva["patch_size"],
            act=fields_.ACTIVATIONS[eva["hidden_act"]],
            eps=eva["layer_norm_eps"],
        ),
        QFormerConfig(
            queries=blip["num_query_tokens"],
            vocab=bert["vocab_size"],
            positions=bert["max_position_embeddings"],
            width=bert["hidden_size"],
            layers=bert["num_hidden_layers"],
            heads=bert["num_attention_heads"],
            mlp=bert["intermediate_size"],
            vision_width=eva["hidden_size"],
            look_every=bert["cross_attention_frequency"],
            act=fields_.ACTIVATIONS[bert["hidden_act"]],
            eps=bert["layer_norm_eps"],
        ),
        llama.config(text),
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
        "vision_config": {
            "model_type": "instructblip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch,
            "hidden_act": fields_.HF_ACTIVATIONS[vision.act],
            "layer_norm_eps": vision.eps,
        },
        "qformer_config": {
            "model_type": "instructblip_qformer",
            "vocab_size": qformer.vocab,
            "hidden_size": qformer.width,
            "num_hidden_layers": qformer.layers,
            "num_attention_heads": qformer.heads,
            "intermediate_size": qformer.mlp,
            "hidden_act": fields_.HF_ACTIVATIONS[qformer.act],
            "max_position_embeddings": qformer.positions,
            "layer_norm_eps": qformer.eps,
            "cross_attention_frequency": qformer.look_every,
            "encoder_hidden_size": qformer.vision_width,
        },
        "text_config": llama.to_hf(config.lm),
    }
