"""Pixtral towers: the fields of a `vision_config`, and the key table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, schema
from mllm_jax.models.pixtral import PixtralConfig

_FIELDS = {
    "model_type": (schema.only("pixtral"), "pixtral"),
    "hidden_size": (schema.WIDTH, 1024),
    "intermediate_size": (schema.WIDTH, 4096),
    "num_hidden_layers": (schema.LAYERS, 24),
    "num_attention_heads": (schema.HEADS, 16),
    "head_dim": (schema.optional(schema.WIDTH), None),
    "num_channels": (schema.only(3), 3),
    "image_size": (schema.SIDE, 1024),
    "patch_size": (schema.SIDE, 16),
    "hidden_act": (fields_.ACTIVATION, "gelu"),
    "rope_parameters": (schema.PART, None),
    "rope_theta": (schema.optional(schema.real(1, 1e12)), None),
}
_ROPE = {
    "rope_type": (schema.only("axial", "default"), "axial"),
    "rope_theta": (schema.optional(schema.real(1, 1e12)), None),
}
_IGNORED = fields_.IGNORED | {"tie_word_embeddings", "vocab_size"}

# Our sites under the prefix of the tower, like the `hf` column of `sites.TABLE` for CLIP.
SITES = {
    "vision.embed": "ln_pre (output)",
    "vision.resid_pre": "transformer.layers.{i} (input)",
    "vision.attn.pattern": "transformer.layers.{i}.attention (weights)",
    "vision.attn.heads": "transformer.layers.{i}.attention.o_proj (input)",
    "vision.attn_out": "transformer.layers.{i}.attention (output)",
    "vision.mlp.act": "transformer.layers.{i}.feed_forward.act_fn (output)",
    "vision.mlp.out": "transformer.layers.{i}.feed_forward (output)",
    "vision.resid_post": "transformer.layers.{i} (output)",
}


# [E, channel, row, column] <-> [channel * row * column, E]
def _flat_patches(config: PixtralConfig) -> keys.Transform:
    shape = (3, config.patch, config.patch)
    return keys.Transform(
        "flat patches", lambda x: x.reshape(len(x), -1).T, lambda x: x.T.reshape(-1, *shape)
    )


def vision(hf: str, ours: str, config: PixtralConfig) -> tuple[keys.Row, ...]:
    """Return the key table of a Pixtral tower."""
    return keys.rows(
        hf,
        ours,
        ("patch_conv.weight", "patch.kernel", _flat_patches(config)),
        ("ln_pre.weight", "pre_norm.scale", keys.COPY),
    ) + keys.rows(
        f"{hf}.transformer.layers.{{layer}}",
        f"{ours}.layers",
        ("attention_norm.weight", "norm1.scale", keys.COPY),
        ("attention.q_proj.weight", "attn.q.kernel", keys.LINEAR),
        ("attention.k_proj.weight", "attn.k.kernel", keys.LINEAR),
        ("attention.v_proj.weight", "attn.v.kernel", keys.LINEAR),
        ("attention.o_proj.weight", "attn.o.kernel", keys.LINEAR),
        ("ffn_norm.weight", "norm2.scale", keys.COPY),
        ("feed_forward.gate_proj.weight", "mlp.gate.kernel", keys.LINEAR),
        ("feed_forward.up_proj.weight", "mlp.up.kernel", keys.LINEAR),
        ("feed_forward.down_proj.weight", "mlp.down.kernel", keys.LINEAR),
    )


def read(fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the fields of a `vision_config` for `config`; append what is wrong to `problems`."""
    pixtral = schema.read(fields, _FIELDS, _IGNORED, "vision_config.", problems)
    rope = pixtral["rope_parameters"] or {}
    rope = schema.read(rope, _ROPE, (), "vision_config.rope_parameters.", problems)
    thetas = {pixtral["rope_theta"], rope["rope_theta"]} - {None}
    if len(thetas) > 1:
        problems.append(f"vision_config has two values of rope_theta: {sorted(thetas)}")
    pixtral["rope_theta"] = float(next(iter(thetas), 10000.0))
    width, heads = pixtral["hidden_size"], pixtral["num_attention_heads"]
    part = "4 x num_attention_heads", 4 * heads  # rows and columns rotate a quarter of a head
    schema.divides(part, ("vision_config.hidden_size", width), problems)
    if pixtral["head_dim"] not in (None, width // heads):
        problems.append(
            f"vision_config.head_dim={pixtral['head_dim']} is not supported, only hidden_size / "
            f"num_attention_heads = {width // heads}"
        )
    return pixtral


def config(pixtral: Mapping[str, Any], *, merge: int, feature_layer: int = -1) -> PixtralConfig:
    """Return the config of fields from `read`.

    Args:
      pixtral: The fields.
      merge: The side of the square of patches that becomes one token; 1 in LLaVA's format.
      feature_layer: The hidden state that is used.
    """
    return PixtralConfig(
        width=pixtral["hidden_size"],
        layers=pixtral["num_hidden_layers"],
        heads=pixtral["num_attention_heads"],
        mlp=pixtral["intermediate_size"],
        patch=pixtral["patch_size"],
        image_size=pixtral["image_size"],
        act=fields_.ACTIVATIONS[pixtral["hidden_act"]],
        theta=pixtral["rope_theta"],
        merge=merge,
        feature_layer=feature_layer,
    )


def to_hf(vision: PixtralConfig) -> dict[str, Any]:
    """Return the `vision_config` of a tower that ends at the layer whose output is used."""
    return {
        "model_type": "pixtral",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp,
        "num_hidden_layers": vision.run_layers,
        "num_attention_heads": vision.heads,
        "head_dim": vision.width // vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch,
        "hidden_act": fields_.HF_ACTIVATIONS[vision.act],
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.theta},
    }
