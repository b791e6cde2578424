"""Towers of SigLIP, Idefics3 and SmolVLM: the fields of a `vision_config`, and the key table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, schema
from mllm_jax.checkpoints.networks import clip, encoder
from mllm_jax.models.siglip import SiglipConfig

FIELDS = encoder.CHANNELS | encoder.table(
    "siglip_vision_model",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=16,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
# The head pools patches for a contrastive loss; the sizes in pixels are the processor's.
_IGNORED = fields_.IGNORED | {
    "max_image_size", "num_image_tokens", "num_positions", "projector_hidden_act", "size",
    "tie_word_embeddings", "use_base_siglip", "vision_use_head", "vocab_size",
}  # fmt: skip

# Our sites under the prefix of the tower, like the `hf` column of `sites.TABLE` for CLIP.
SITES = {
    "vision.embed": "embeddings (output)",
    "vision.resid_pre": "encoder.layers.{i} (input)",
    "vision.attn.pattern": "encoder.layers.{i}.self_attn (weights)",
    "vision.attn.heads": "encoder.layers.{i}.self_attn.out_proj (input)",
    "vision.attn_out": "encoder.layers.{i}.self_attn (output)",
    "vision.mlp.act": "encoder.layers.{i}.mlp.activation_fn (output)",
    "vision.mlp.out": "encoder.layers.{i}.mlp (output)",
    "vision.resid_post": "encoder.layers.{i} (output)",
}


def vision(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of a SigLIP tower."""
    embeddings = keys.rows(
        hf,
        ours,
        ("embeddings.patch_embedding.weight", "patch.kernel", keys.PATCHES),
        ("embeddings.patch_embedding.bias", "patch.bias", keys.COPY),
        ("embeddings.position_embedding.weight", "position", keys.COPY),
        *keys.norm("post_layernorm", "norm"),
    )
    return embeddings + clip.layers(hf, ours)


def read(
    fields: Mapping[str, Any], problems: list[str], table: schema.Table = FIELDS
) -> dict[str, Any]:
    """Return the fields of a `vision_config`.

    Args:
      fields: The content of the `vision_config`.
      problems: A list to which problems are appended.
      table: The table of fields; SigLIP's by default.
    """
    # The side of an image need not be a multiple of that of a patch: the rest is cut off.
    siglip = schema.read(fields, table, _IGNORED, "vision_config.", problems)
    heads = "num_attention_heads", siglip["num_attention_heads"]
    schema.divides(heads, ("vision_config.hidden_size", siglip["hidden_size"]), problems)
    return siglip


def config(siglip: Mapping[str, Any], *, feature_layer: int | None = None) -> SiglipConfig:
    """Return the config of fields from `read`, with the layer that is used; None for all."""
    return SiglipConfig(**encoder.arguments(siglip), feature_layer=feature_layer)


def to_hf(vision: SiglipConfig, model_type: str = "siglip_vision_model") -> dict[str, Any]:
    """Return the `vision_config` of a tower that ends at the layer whose output is used."""
    head = {"vision_use_head": False} if model_type == "siglip_vision_model" else {}
    return encoder.to_hf(vision, model_type) | {"num_hidden_layers": vision.run_layers} | head
