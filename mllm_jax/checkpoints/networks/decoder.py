"""Language models of transformers: the fields of a `text_config`, and the key table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, schema
from mllm_jax.checkpoints.networks import rope
from mllm_jax.checkpoints.networks.decoder_types import MODELS
from mllm_jax.models.decoder import DecoderConfig

TYPES = tuple(MODELS)
_IGNORED = fields_.IGNORED | frozenset(
    """
    _attn_implementation _flash_attn_2_enabled _sliding_window_pattern cache_implementation
    is_llama_config neftune_noise_alpha num_image_tokens perceiver_config
    pixel_shuffle_factor transformers.js_config use_resampler
    """.split()  # noqa: SIM905
)


def nested(fields: Mapping[str, Any], default: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the fields of the language model from those of the whole model.

    Args:
      fields: The content of `config.json`. The first Qwen2-VL and Qwen2.5-VL checkpoints have
        all fields at its root; some have them there and in `text_config`, which takes precedence.
      default: The model type of the language model if `text_config` does not state it.

    Returns:
      The fields of the whole model, and those of the language model.
    """
    # Of both models; `config` gets the root's tie_word_embeddings.
    shared = {"tie_word_embeddings", *fields_.TOKEN_IDS}
    own = set(MODELS[default].fields) - shared
    text = fields.get("text_config") or {name: fields[name] for name in fields if name in own}
    whole = {name: value for name, value in fields.items() if name not in own}
    return whole, {"model_type": default} | (dict(text) if isinstance(text, Mapping) else {})


def read(
    fields: Mapping[str, Any],
    problems: list[str],
    *,
    types: Sequence[str] = TYPES,
    default: str = "llama",
    prefix: str = "text_config.",
) -> dict[str, Any]:
    """Read the fields of a language model.

    Args:
      fields: The content of a `text_config`.
      problems: A list to which problems are appended.
      types: The model types that the family has.
      default: The model type if the fields do not state it.
      prefix: The prefix of the names, for an error.

    Returns:
      The fields for `config`, by their names in transformers.
    """
    kind = fields.get("model_type", default)
    model = MODELS[kind if isinstance(kind, str) and kind in types else default]
    table = {"model_type": (schema.only(*types), default), **model.fields}
    text = schema.read(fields, table, _IGNORED, prefix, problems)
    model = MODELS[text["model_type"]]
    text["num_key_value_heads"] = text["num_key_value_heads"] or text["num_attention_heads"]
    _check_heads(text, prefix, problems)
    text["head_dim"] = text["head_dim"] or text["hidden_size"] // text["num_attention_heads"]
    if text["head_dim"] % 2:
        problems.append(f"{prefix[:-1] or 'it'} has heads of odd width {text['head_dim']}")
    if "rope_local_base_freq" in text:
        text["rope"] = rope.read_by_layer_type(text, model.theta, 1e4, prefix, problems)
    else:
        text["rope"] = rope.read(text, model.theta, model.sections, prefix, problems)
    sections = text["rope"].sections
    if sections is not None and 2 * sum(sections.sizes) != text["head_dim"]:
        problems.append(
            f"{prefix}rope_scaling.mrope_section={list(sections.sizes)} must add up to "
            f"{text['head_dim'] // 2}, half the width of a head"
        )
    text["windows"] = _windows(text, prefix, problems)
    return text


def _check_heads(text: Mapping[str, Any], prefix: str, problems: list[str]) -> None:
    """Append to `problems` if the numbers of heads do not fit."""
    heads = "num_attention_heads", text["num_attention_heads"]
    kv_heads = "num_key_value_heads", text["num_key_value_heads"]
    width = f"{prefix}hidden_size", text["hidden_size"]
    schema.divides(kv_heads, (f"{prefix}{heads[0]}", heads[1]), problems)
    if text["head_dim"] is None:
        schema.divides(heads, width, problems)
    elif text["model_type"].startswith("qwen2_") and text["head_dim"] * heads[1] != width[1]:
        problems.append(
            f"{prefix}head_dim={text['head_dim']} is not supported in {text['model_type']}, "
            "only hidden_size / num_attention_heads"
        )


def _windows(text: Mapping[str, Any], prefix: str, problems: list[str]) -> tuple[int, ...]:
    """Return the window of each layer, 0 for none; empty if no layer has one."""
    layers, window = range(text["num_hidden_layers"]), text.get("sliding_window")
    if not text.get("use_sliding_window", True):
        window = None
    given = text.get("layer_types")
    if given is not None:
        if len(given) != len(layers):
            problems.append(f"{prefix}layer_types has {len(given)} layers of {len(layers)}")
            return ()
        slides = [kind == "sliding_attention" for kind in given]
    elif "max_window_layers" in text:
        slides = [window is not None and i >= text["max_window_layers"] for i in layers]
    elif "sliding_window_pattern" in text:
        slides = [bool((i + 1) % text["sliding_window_pattern"]) for i in layers]
    elif text["model_type"] == "gemma2":
        slides = [i % 2 == 0 for i in layers]
    else:  # Mistral; a window as long as a row has no effect
        slides = [window is not None and window < text["max_position_embeddings"] for _ in layers]
    if not any(slides):
        return ()
    if window is None:
        problems.append(f"{prefix}layer_types has sliding_attention and no sliding_window is used")
        return ()
    return tuple(window if slide else 0 for slide in slides)


def config(text: Mapping[str, Any], *, tied: bool | None = None) -> DecoderConfig:
    """Return the config of fields from `read`.

    Args:
      text: The fields.
      tied: Whether the head is tied to the embedding according to the config of the whole model;
        None to use these fields.
    """
    model, gemma = MODELS[text["model_type"]], "hidden_activation" in text
    parts = dict(model.parts)
    if text.get("attention_bias"):
        parts["biases"] = "qkvo"
    if "query_pre_attn_scalar" in text:
        scalar = text["query_pre_attn_scalar"]
        parts["query_scale"] = None if scalar == text["head_dim"] else scalar**-0.5
        parts["logit_softcap"] = text["final_logit_softcapping"]
    if text["model_type"] == "gemma2":
        parts["attention_softcap"] = text["attn_logit_softcapping"]
    if text["windows"]:
        parts["local_rope_theta"] = text["rope"].local_theta
    return DecoderConfig(
        vocab=text["vocab_size"],
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_width=text["head_dim"],
        mlp=text["intermediate_size"],
        act=_activation(text),
        rope_theta=text["rope"].theta,
        rope_scaling=text["rope"].scaling,
        rope_sections=text["rope"].sections,
        windows=text["windows"],
        eps=text["rms_norm_eps"],
        embedding_scale=text["hidden_size"] ** 0.5 if gemma else 1.0,
        tied=text["tie_word_embeddings"] if tied is None else tied,
        **parts,
    )


def _activation(text: Mapping[str, Any]) -> str:
    if "query_pre_attn_scalar" in text:
        return fields_.ACTIVATIONS[text["hidden_activation"]]
    return "gelu_tanh" if text["model_type"] == "gemma" else "silu"


def to_hf(lm: DecoderConfig) -> dict[str, Any]:
    """Return the `text_config` of a language model; a Mistral without a window is a Llama.

    That of Qwen2-VL equals that of Qwen2.5-VL except for the `model_type`.

    Raises:
      ValueError: transformers has no model with these parts.
    """
    kind = _model_type(lm)
    known = MODELS[kind].fields
    every: dict[str, Any] = {
        "vocab_size": lm.vocab,
        "hidden_size": lm.width,
        "intermediate_size": lm.mlp,
        "num_hidden_layers": lm.layers,
        "num_attention_heads": lm.heads,
        "num_key_value_heads": lm.kv_heads,
        "head_dim": lm.head_width,
        "hidden_act": fields_.HF_ACTIVATIONS[lm.act],
        "hidden_activation": fields_.HF_ACTIVATIONS[lm.act],
        "attention_bias": lm.biases == "qkvo",
        "rms_norm_eps": lm.eps,
        "tie_word_embeddings": lm.tied,
        "query_pre_attn_scalar": round((lm.query_scale or lm.head_width**-0.5) ** -2),
        "final_logit_softcapping": lm.logit_softcap,
        "attn_logit_softcapping": lm.attention_softcap,
        "use_sliding_window": bool(lm.windows),
        "sliding_window": max(lm.windows, default=0),
        "layer_types": [
            "sliding_attention" if window else "full_attention"
            for window in lm.windows or [0] * lm.layers
        ],
    }
    if not lm.windows:
        del every["sliding_window"]
    fields = {"model_type": kind} | {n: value for n, value in every.items() if n in known}
    fields |= rope.to_hf(lm.rope_theta, lm.rope_scaling, lm.rope_sections, lm.local_rope_theta)
    problems: list[str] = []
    back = config(read(fields, problems))
    if problems or back != lm:
        differ = [
            f"{field.name}={getattr(lm, field.name)!r}"
            for field in dataclasses.fields(lm)
            if getattr(lm, field.name) != getattr(back, field.name)
        ]
        raise ValueError(
            f"transformers has no language model with {', '.join(differ) or '; '.join(problems)}; "
            f"the nearest is {kind}"
        )
    return fields


def _model_type(lm: DecoderConfig) -> str:
    """Return the model type that has the parts of a language model."""
    if lm.unit_offset:
        return "gemma" if not lm.post_norms else "gemma3_text" if lm.qk_norm else "gemma2"
    if lm.qk_norm:
        return "qwen3_vl_text" if lm.rope_sections else "qwen3"
    if lm.biases == "qkv":
        return "qwen2_5_vl_text" if lm.rope_sections else "qwen2"
    return "mistral" if lm.windows else "llama"


def table(
    lm: DecoderConfig,
    prefix: str = "language_model.model",
    head: str = "language_model.lm_head",
) -> tuple[keys.Row, ...]:
    """Return the key table of a language model.

    Args:
      lm: The language model.
      prefix: The prefix of its keys in the canonical spelling of the family.
      head: The prefix of the keys of its head.
    """
    # If outputs are normalised as well, `post_attention_layernorm` is the norm of the output.
    after = "pre_feedforward_layernorm" if lm.post_norms else "post_attention_layernorm"
    norms = {"input_layernorm": "attn_norm", after: "mlp_norm"}
    if lm.post_norms:
        norms |= {
            "post_attention_layernorm": "attn_post_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    norms |= {f"self_attn.{name}_norm": f"attn.{name}_norm" for name in "qk"}
    return (
        keys.Row(f"{prefix}.embed_tokens.weight", "lm.embed", keys.COPY),
        keys.Row(f"{prefix}.norm.weight", "lm.norm.scale", keys.COPY),
        keys.Row(f"{head}.weight", "lm.head.kernel", keys.LINEAR),
        *keys.rows(
            f"{prefix}.layers.{{layer}}",
            "lm.layers",
            *((f"{theirs}.weight", f"{ours}.scale", keys.COPY) for theirs, ours in norms.items()),
            *(row for n in "qkvo" for row in keys.linear(f"self_attn.{n}_proj", f"attn.{n}")),
            *(
                row
                for n in ("gate", "up", "down")
                for row in keys.linear(f"mlp.{n}_proj", f"mlp.{n}")
            ),
        ),
    )


def is_unused(key: str, lm: DecoderConfig, head: str = "language_model.lm_head") -> bool:
    """Return whether a tensor is a buffer or the second copy of a tied embedding."""
    return keys.is_buffer(key) or (lm.tied and key == f"{head}.weight")
