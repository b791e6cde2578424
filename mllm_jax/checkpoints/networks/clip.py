"""CLIP towers: the fields of a `vision_config`, and the key table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, schema
from mllm_jax.models.clip import ClipConfig

TOWER = {  # the fields of any vision transformer
    "hidden_size": (schema.WIDTH, 768),
    "intermediate_size": (schema.WIDTH, 3072),
    "num_hidden_layers": (schema.LAYERS, 12),
    "num_attention_heads": (schema.HEADS, 12),
    "num_channels": (schema.only(3), 3),
    "image_size": (schema.SIDE, 224),
    "patch_size": (schema.SIDE, 32),
    "hidden_act": (fields_.ACTIVATION, "quick_gelu"),
    "layer_norm_eps": (schema.EPSILON, 1e-5),
}
_CLIP = TOWER | {"model_type": (schema.only("clip_vision_model"), "clip_vision_model")}
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
    clip = schema.read(fields, _CLIP, _IGNORED, "vision_config.", problems)
    check_tower(clip, problems)
    return clip


def check_tower(tower: Mapping[str, Any], problems: list[str]) -> None:
    """Append to `problems` where the sizes of a vision transformer do not fit each other."""
    for part, whole in (("num_attention_heads", "hidden_size"), ("patch_size", "image_size")):
        schema.divides((part, tower[part]), (f"vision_config.{whole}", tower[whole]), problems)


def config(clip: Mapping[str, Any], *, feature_layer: int, select: str) -> ClipConfig:
    """Return the config of fields from `read`, with the layer and the tokens that are used."""
    return ClipConfig(
        width=clip["hidden_size"],
        layers=clip["num_hidden_layers"],
        heads=clip["num_attention_heads"],
        mlp=clip["intermediate_size"],
        image_size=clip["image_size"],
        patch=clip["patch_size"],
        act=fields_.ACTIVATIONS[clip["hidden_act"]],
        eps=clip["layer_norm_eps"],
        feature_layer=feature_layer,
        select=select,
    )


def to_hf(vision: ClipConfig) -> dict[str, Any]:
    """Return the `vision_config` of a tower that ends at the layer whose output is used."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp,
        "num_hidden_layers": vision.run_layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch,
        "hidden_act": fields_.HF_ACTIVATIONS[vision.act],
        "layer_norm_eps": vision.eps,
    }
