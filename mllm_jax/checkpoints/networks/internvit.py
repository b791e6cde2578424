"""InternViT towers: the fields of a `vision_config`, and the key table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, schema
from mllm_jax.checkpoints.networks import encoder
from mllm_jax.models.internvit import InternVitConfig

_SQUARE = schema.either(schema.SIDE, schema.many(schema.SIDE, 2, 2))
_FIELDS = (
    encoder.CHANNELS
    | encoder.table(
        "internvl_vision",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    | {
        "attention_bias": (schema.FLAG, False),
        "use_qk_norm": (schema.FLAG, False),
        "norm_type": (schema.only("layer_norm", "rms_norm"), "layer_norm"),
        "image_size": (_SQUARE, (448, 448)),
        "patch_size": (_SQUARE, (14, 14)),
        "use_mask_token": (schema.only(False), False),
        "use_absolute_position_embeddings": (schema.only(True), True),
        "use_mean_pooling": (schema.FLAG, True),
    }
)
_IGNORED = fields_.IGNORED | {
    "hidden_dropout_prob", "layer_scale_init_value", "projection_dropout", "tie_word_embeddings",
}  # fmt: skip

# Our sites under the prefix of the tower, like the `hf` column of `sites.TABLE` for CLIP. The
# residual gets `attention` times `lambda_1`, and `mlp` times `lambda_2`.
SITES = {
    "vision.embed": "embeddings (output)",
    "vision.resid_pre": "encoder.layer.{i} (input)",
    "vision.attn.pattern": "encoder.layer.{i}.attention (weights)",
    "vision.attn.heads": "encoder.layer.{i}.attention.projection_layer (input)",
    "vision.mlp.act": "encoder.layer.{i}.mlp.activation_fn (output)",
    "vision.resid_post": "encoder.layer.{i} (output)",
}


def vision(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of an InternViT."""
    return keys.rows(
        hf,
        ours,
        ("embeddings.cls_token", "cls", keys.CLS_TOKEN),
        ("embeddings.position_embeddings", "position", keys.LEADING),
        ("embeddings.patch_embeddings.projection.weight", "patch.kernel", keys.PATCHES),
        ("embeddings.patch_embeddings.projection.bias", "patch.bias", keys.COPY),
        *keys.norm("layernorm", "norm"),
    ) + keys.rows(
        f"{hf}.encoder.layer.{{layer}}",
        f"{ours}.layers",
        *keys.norm("layernorm_before", "norm1"),
        *keys.linear("attention.q_proj", "attn.q"),
        *keys.linear("attention.k_proj", "attn.k"),
        *keys.linear("attention.v_proj", "attn.v"),
        *keys.norm("attention.q_norm", "attn.q_norm"),
        *keys.norm("attention.k_norm", "attn.k_norm"),
        *keys.linear("attention.projection_layer", "attn.o"),
        ("lambda_1", "scale1", keys.COPY),
        *keys.norm("layernorm_after", "norm2"),
        *keys.linear("mlp.fc1", "mlp.up"),
        *keys.linear("mlp.fc2", "mlp.down"),
        ("lambda_2", "scale2", keys.COPY),
    )


def read(fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the fields of a `vision_config` for `config`; append what is wrong to `problems`."""
    vit = schema.read(fields, _FIELDS, _IGNORED, "vision_config.", problems)
    for name in ("image_size", "patch_size"):
        sides = vit[name] if isinstance(vit[name], (list, tuple)) else (vit[name],)
        if len(set(sides)) > 1:
            problems.append(f"vision_config.{name}={list(sides)} is not a square")
        vit[name] = sides[0]
    for part, whole in (("num_attention_heads", "hidden_size"), ("patch_size", "image_size")):
        schema.divides((part, vit[part]), (f"vision_config.{whole}", vit[whole]), problems)
    return vit


def config(
    vit: Mapping[str, Any], *, feature_layer: int = -1, select: Literal["patch", "full"] = "patch"
) -> InternVitConfig:
    """Return the config of fields from `read`, with the layer and the tokens that are used."""
    return InternVitConfig(
        **encoder.arguments(vit),
        norm="rms" if vit["norm_type"] == "rms_norm" else "layer",
        qkv_bias=vit["attention_bias"],
        qk_norm=vit["use_qk_norm"],
        final_norm=not vit["use_mean_pooling"],
        feature_layer=feature_layer,
        select=select,
    )


def to_hf(vision: InternVitConfig) -> dict[str, Any]:
    """Return the `vision_config` of a tower that ends at the layer whose output is used."""
    return encoder.to_hf(vision, "internvl_vision") | {
        "num_hidden_layers": vision.run_layers,
        "image_size": [vision.image_size] * 2,
        "patch_size": [vision.patch] * 2,
        "norm_type": "rms_norm" if vision.norm == "rms" else "layer_norm",
        "attention_bias": vision.qkv_bias,
        "use_qk_norm": vision.qk_norm,
        "use_mean_pooling": not vision.has_norm,
    }
