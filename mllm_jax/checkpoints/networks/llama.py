"""Llama and Mistral: the fields of a `text_config`, and the key table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, schema
from mllm_jax.models.decoder import DecoderConfig

_THETA = schema.optional(schema.real(1, 1e11))
_ROPE = {
    "rope_theta": (_THETA, None),
    "rope_type": (schema.only("default"), "default"),
    "type": (schema.only("default"), "default"),
}
_LLAMA = fields_.TOKEN_IDS | {
    "model_type": (schema.only("llama", "mistral"), "llama"),
    "vocab_size": (schema.WORDS, 32000),
    "hidden_size": (schema.WIDTH, 4096),
    "intermediate_size": (schema.WIDTH, 11008),
    "num_hidden_layers": (schema.LAYERS, 32),
    "num_attention_heads": (schema.HEADS, 32),
    "num_key_value_heads": (schema.optional(schema.HEADS), None),
    "head_dim": (schema.optional(schema.whole(2, 2**14)), None),
    "hidden_act": (schema.only("silu", "swish"), "silu"),
    "attention_bias": (schema.only(False), False),
    "mlp_bias": (schema.only(False), False),
    "max_position_embeddings": (schema.PLACES, 2048),
    "rms_norm_eps": (schema.EPSILON, 1e-6),
    "rope_theta": (_THETA, None),
    "rope_parameters": (schema.PART, None),
    "rope_scaling": (schema.PART, None),
    "sliding_window": (schema.only(None), None),
    "tie_word_embeddings": (schema.FLAG, False),
}
_MISTRAL = {name: _LLAMA[name] for name in _LLAMA if name not in ("attention_bias", "mlp_bias")} | {
    "intermediate_size": (schema.WIDTH, 14336),
    "num_key_value_heads": (schema.optional(schema.HEADS), 8),
    "sliding_window": (schema.optional(schema.PLACES), 4096),
    "max_position_embeddings": (schema.PLACES, 131072),
}


TABLE = keys.rows(
    "language_model",
    "lm",
    ("model.embed_tokens.weight", "embed", keys.COPY),
    ("model.norm.weight", "norm.scale", keys.COPY),
    ("lm_head.weight", "head.kernel", keys.LINEAR),
) + keys.rows(
    "language_model.model.layers.{layer}",
    "lm.layers",
    ("input_layernorm.weight", "attn_norm.scale", keys.COPY),
    ("self_attn.q_proj.weight", "attn.q.kernel", keys.LINEAR),
    ("self_attn.k_proj.weight", "attn.k.kernel", keys.LINEAR),
    ("self_attn.v_proj.weight", "attn.v.kernel", keys.LINEAR),
    ("self_attn.o_proj.weight", "attn.o.kernel", keys.LINEAR),
    ("post_attention_layernorm.weight", "mlp_norm.scale", keys.COPY),
    ("mlp.gate_proj.weight", "mlp.gate.kernel", keys.LINEAR),
    ("mlp.up_proj.weight", "mlp.up.kernel", keys.LINEAR),
    ("mlp.down_proj.weight", "mlp.down.kernel", keys.LINEAR),
)


def read(fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the fields of a `text_config` for `config`; append what is wrong to `problems`."""
    mistral = fields.get("model_type") == "mistral"
    llama = schema.read(
        fields, _MISTRAL if mistral else _LLAMA, fields_.IGNORED, "text_config.", problems
    )
    if mistral:
        _check_window(llama, problems)
    heads = "num_attention_heads", llama["num_attention_heads"]
    kv_heads = "num_key_value_heads", llama["num_key_value_heads"] or heads[1]
    schema.divides(kv_heads, (f"text_config.{heads[0]}", heads[1]), problems)
    if llama["head_dim"] is None:
        schema.divides(heads, ("text_config.hidden_size", llama["hidden_size"]), problems)
    if head_width(llama) % 2:
        problems.append(f"text_config has heads of odd width {head_width(llama)}")
    return llama | {"rope_theta": _rope_theta(llama, problems)}


def head_width(llama: Mapping[str, Any]) -> int:
    """Return the width of a head."""
    return llama["head_dim"] or llama["hidden_size"] // llama["num_attention_heads"]


def config(llama: Mapping[str, Any], *, tied: bool = False) -> DecoderConfig:
    """Return the config of fields from `read`.

    Args:
        llama: the fields.
        tied: whether the config of the whole model ties the head to the embedding.
    """
    return DecoderConfig(
        vocab=llama["vocab_size"],
        width=llama["hidden_size"],
        layers=llama["num_hidden_layers"],
        heads=llama["num_attention_heads"],
        kv_heads=llama["num_key_value_heads"] or llama["num_attention_heads"],
        head_width=head_width(llama),
        mlp=llama["intermediate_size"],
        rope_theta=llama["rope_theta"],
        eps=llama["rms_norm_eps"],
        tied=bool(tied or llama["tie_word_embeddings"]),
    )


def to_hf(lm: DecoderConfig) -> dict[str, Any]:
    """Return the `text_config` of a language model; a Mistral without a window is a Llama."""
    return {
        "model_type": "llama",
        "vocab_size": lm.vocab,
        "hidden_size": lm.width,
        "intermediate_size": lm.mlp,
        "num_hidden_layers": lm.layers,
        "num_attention_heads": lm.heads,
        "num_key_value_heads": lm.kv_heads,
        "head_dim": lm.head_width,
        "rms_norm_eps": lm.eps,
        "rope_theta": lm.rope_theta,
        "tie_word_embeddings": lm.tied,
    }


def _rope_theta(llama: Mapping[str, Any], problems: list[str]) -> float:
    """Return the base of the rotary angles; append any rotary scaling to `problems`."""
    thetas = {llama["rope_theta"]}
    for name in ("rope_parameters", "rope_scaling"):
        rope = schema.read(llama[name] or {}, _ROPE, (), f"text_config.{name}.", problems)
        thetas.add(rope["rope_theta"])
    thetas.discard(None)
    if len(thetas) > 1:
        problems.append(f"text_config has two values of rope_theta: {sorted(thetas)}")
    return float(next(iter(thetas), 10000.0))


def _check_window(llama: Mapping[str, Any], problems: list[str]) -> None:
    """Append to `problems` a window shorter than the longest row; a longer one has no effect."""
    window, longest = llama["sliding_window"], llama["max_position_embeddings"]
    if window is not None and window < longest:
        problems.append(
            f"text_config.sliding_window={window} is not supported where rows may have "
            f"max_position_embeddings={longest} tokens, only None"
        )


def is_unused(key: str, lm: DecoderConfig) -> bool:
    """Return whether a tensor is a buffer or the second copy of a tied embedding."""
    return keys.is_buffer(key) or (lm.tied and key == "language_model.lm_head.weight")
