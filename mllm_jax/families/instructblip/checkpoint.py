"""InstructBLIP's checkpoints: its config, and its key table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import schema, tables
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.llava import config as configs
from mllm_jax.models.eva import EvaConfig
from mllm_jax.models.qformer import QFormerConfig

# The fields we read, with the value HF gives to a field that is not there.
_BLIP = configs.TOKEN_IDS | {
    "model_type": (schema.only("instructblip"), "instructblip"),
    "use_decoder_only_language_model": (schema.only(True), True),
    "image_token_index": (schema.optional(schema.ID), None),
    "num_query_tokens": (schema.whole(1, 4096), 32),
    "qformer_config": (schema.PART, None),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
}
_EVA = configs.TOWER | {
    "model_type": (schema.only("instructblip_vision_model"), "instructblip_vision_model"),
    "hidden_size": (schema.WIDTH, 1408),
    "intermediate_size": (schema.WIDTH, 6144),
    "num_hidden_layers": (schema.LAYERS, 39),
    "num_attention_heads": (schema.HEADS, 16),
    "patch_size": (schema.SIDE, 14),
    "hidden_act": (configs.ACTIVATION, "gelu"),
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
    "hidden_act": (configs.ACTIVATION, "gelu"),
    "max_position_embeddings": (schema.whole(1, 2**20), 512),
    "layer_norm_eps": (schema.EPSILON, 1e-12),
    "cross_attention_frequency": (schema.LAYERS, 2),
}
# Whether a head is tied, the LM's own config says; the width of the features, the tower's.
_IGNORED = configs.IGNORED | {"tie_word_embeddings"}
_QFORMER_IGNORED = _IGNORED | {
    "attention_probs_dropout_prob", "classifier_dropout", "encoder_hidden_size",
    "hidden_dropout_prob",
}  # fmt: skip


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> InstructBlipConfig:
    """Reads the config of an InstructBLIP checkpoint; see `config.from_hf`."""
    problems: list[str] = []
    blip = schema.read(configs.renamed(fields), _BLIP, _IGNORED, "", problems)
    eva = schema.read(blip["vision_config"] or {}, _EVA, _IGNORED, "vision_config.", problems)
    configs.check_tower(eva, problems)
    bert = schema.read(
        blip["qformer_config"] or {}, _QFORMER, _QFORMER_IGNORED, "qformer_config.", problems
    )
    heads = "num_attention_heads", bert["num_attention_heads"]
    schema.divides(heads, ("qformer_config.hidden_size", bert["hidden_size"]), problems)
    # HF takes a text_config that does not say what it is for an OPT.
    llama = configs.read_llama({"model_type": "opt"} | (blip["text_config"] or {}), problems)
    return configs.settle(lambda: _config(blip, eva, bert, llama), source, problems)


def _config(blip: Mapping, eva: Mapping, bert: Mapping, llama: Mapping) -> InstructBlipConfig:
    token = blip["image_token_index"]
    return InstructBlipConfig.of(
        EvaConfig(
            width=eva["hidden_size"],
            layers=eva["num_hidden_layers"],
            heads=eva["num_attention_heads"],
            mlp=eva["intermediate_size"],
            image_size=eva["image_size"],
            patch=eva["patch_size"],
            act=configs.ACTIVATIONS[eva["hidden_act"]],
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
            act=configs.ACTIVATIONS[bert["hidden_act"]],
            eps=bert["layer_norm_eps"],
        ),
        configs.llama_config(llama),
        image_token=-1 if token is None else token,
    )


def to_hf(config: InstructBlipConfig) -> dict[str, Any]:
    """Writes our config as the fields of a `config.json`; the inverse of `from_hf`."""
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
            "hidden_act": configs.HF_ACTIVATIONS[vision.act],
            "layer_norm_eps": vision.eps,
        },
        "qformer_config": {
            "model_type": "instructblip_qformer",
            "vocab_size": qformer.vocab,
            "hidden_size": qformer.width,
            "num_hidden_layers": qformer.layers,
            "num_attention_heads": qformer.heads,
            "intermediate_size": qformer.mlp,
            "hidden_act": configs.HF_ACTIVATIONS[qformer.act],
            "max_position_embeddings": qformer.positions,
            "layer_norm_eps": qformer.eps,
            "cross_attention_frequency": qformer.look_every,
            "encoder_hidden_size": qformer.vision_width,
        },
        "text_config": configs.llama_fields(config.lm),
    }


_BATCH = tables.Transform("batch", lambda x: x[0], lambda x: x[None])  # [1, ...] <-> [...]

_VISION = tables.rows(
    "vision_model",
    "vision",
    ("embeddings.class_embedding", "cls", _BATCH),
    ("embeddings.position_embedding", "position", _BATCH),
    ("embeddings.patch_embedding.weight", "patch.kernel", tables.PATCHES),
    ("embeddings.patch_embedding.bias", "patch.bias", tables.COPY),
    *tables.norm("post_layernorm", "norm"),
) + tables.rows(
    "vision_model.encoder.layers.{layer}",
    "vision.layers",
    *tables.norm("layer_norm1", "norm1"),
    *tables.linear("self_attn.qkv", "attn.q", (0, 3)),
    *tables.linear("self_attn.qkv", "attn.k", (1, 3)),
    *tables.linear("self_attn.qkv", "attn.v", (2, 3)),
    *tables.linear("self_attn.projection", "attn.o"),
    *tables.norm("layer_norm2", "norm2"),
    *tables.linear("mlp.fc1", "mlp.up"),
    *tables.linear("mlp.fc2", "mlp.down"),
)


_ATTENTION = (
    *tables.linear("attention.query", "q"),
    *tables.linear("attention.key", "k"),
    *tables.linear("attention.value", "v"),
    *tables.linear("output.dense", "o"),
    *tables.norm("output.LayerNorm", "norm"),
)


def _mlp(suffix: str, ours: str) -> tuple[tuple, ...]:
    return (
        *tables.linear(f"intermediate{suffix}.dense", f"{ours}.up"),
        *tables.linear(f"output{suffix}.dense", f"{ours}.down"),
        *tables.norm(f"output{suffix}.LayerNorm", f"{ours}.norm"),
    )


def table(config: InstructBlipConfig) -> tuple[tables.Row, ...]:
    """The key table."""
    layer = "qformer.encoder.layer.{layer}"
    return (
        *_VISION,
        tables.Row("query_tokens", "qformer.queries", _BATCH),
        *tables.rows(
            "qformer.embeddings",
            "qformer",
            ("word_embeddings.weight", "words", tables.COPY),
            ("position_embeddings.weight", "position", tables.COPY),
            *tables.norm("layernorm", "norm"),
        ),
        *tables.rows(layer, "qformer.layers", *_mlp("", "mlp"), *_mlp("_query", "query_mlp")),
        *tables.rows(f"{layer}.attention", "qformer.layers.attn", *_ATTENTION),
        *tables.rows(
            f"{layer}.crossattention", "qformer.look", *_ATTENTION, every=config.qformer.look_every
        ),
        tables.Row("language_projection.weight", "projector.linears.0.kernel", tables.LINEAR),
        tables.Row("language_projection.bias", "projector.linears.0.bias", tables.COPY),
        *tables.LLAMA,
    )
