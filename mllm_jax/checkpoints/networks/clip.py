"""CLIP towers: the fields of a `vision_config`, and the key table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import encoder
from mllm_jax.models.clip import ClipConfig

_CLIP = encoder.CHANNELS | encoder.table(
    "clip_vision_model",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
_IGNORED = fields_.IGNORED | {"vocab_size", "tie_word_embeddings"}  # both without effect

_LAYER = (
    *keys.norm("layer_norm1", "norm1"),
    *keys.linear("self_attn.q_proj", "attn.q"),
    *keys.linear("self_attn.k_proj", "attn.k"),
    *keys.linear("self_attn.v_proj", "attn.v"),
    *keys.linear("self_attn.out_proj", "attn.o"),
    *keys.norm("layer_norm2", "norm2"),
    *keys.linear("mlp.fc1", "mlp.up"),
    *keys.linear("mlp.fc2", "mlp.down"),
)


def layers(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of the layers of a CLIP tower for images or text."""
    return keys.rows(f"{hf}.encoder.layers.{{layer}}", f"{ours}.layers", *_LAYER)


def vision(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of a CLIP vision tower up to its last layer."""
    embeddings = keys.rows(
        hf,
        ours,
        ("embeddings.class_embedding", "cls", keys.COPY),
        ("embeddings.patch_embedding.weight", "patch.kernel", keys.PATCHES),
        ("embeddings.position_embedding.weight", "position", keys.COPY),
        *keys.norm("pre_layrnorm", "pre_norm"),  # the spelling of the key
    )
    return embeddings + layers(hf, ours)


def read(fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the fields of a `vision_config` for `config`; append what is wrong to `problems`."""
    return encoder.read(fields, _CLIP, _IGNORED, "vision_config.", problems)


def config(clip: Mapping[str, Any], *, feature_layer: int, select: str) -> ClipConfig:
    """Return the config of fields from `read`, with the layer and the tokens that are used."""
    return ClipConfig(**encoder.arguments(clip), feature_layer=feature_layer, select=select)


def to_hf(vision: ClipConfig) -> dict[str, Any]:
    """Return the `vision_config` of a tower that ends at the layer whose output is used."""
    fields = encoder.to_hf(vision, "clip_vision_model")
    return fields | {"num_hidden_layers": vision.run_layers}
