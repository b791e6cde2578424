"""The towers of Qwen2-VL, 2.5-VL and 3-VL: the fields of a `vision_config`, and the key tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, schema
from mllm_jax.models.qwen_vision import QwenVisionConfig

_NUMBERS = schema.many(schema.whole(0, 1023), 0, 1024)
_TOWER = {
    "depth": (schema.LAYERS, 32),
    "num_heads": (schema.HEADS, 16),
    "in_channels": (schema.only(3), 3),
    "in_chans": (schema.only(3), 3),  # as the files of Qwen spell it
    "patch_size": (schema.SIDE, 14),
    "spatial_merge_size": (schema.whole(1, 16), 2),
    "temporal_patch_size": (schema.whole(1, 16), 2),
    "rope_parameters": (schema.PART, None),
}
_QWEN2 = _TOWER | {
    "model_type": (schema.only("qwen2_vl", "qwen2_vl_vision"), "qwen2_vl_vision"),
    "embed_dim": (schema.WIDTH, 1280),
    "hidden_size": (schema.WIDTH, 3584),  # of the language model
    "hidden_act": (fields_.ACTIVATION, "quick_gelu"),
    "mlp_ratio": (schema.either(schema.whole(1, 64), schema.real(0.01, 64)), 4),
}
_QWEN2_5 = _TOWER | {
    "model_type": (schema.only("qwen2_5_vl", "qwen2_5_vl_vision"), "qwen2_5_vl_vision"),
    "hidden_size": (schema.WIDTH, 3584),
    "intermediate_size": (schema.WIDTH, 3420),
    "out_hidden_size": (schema.WIDTH, 3584),
    "hidden_act": (fields_.ACTIVATION, "silu"),
    "window_size": (schema.SIDE, 112),
    "fullatt_block_indexes": (_NUMBERS, (7, 15, 23, 31)),
}
_QWEN3 = _TOWER | {
    "model_type": (schema.only("qwen3_vl", "qwen3_vl_vision"), "qwen3_vl_vision"),
    "depth": (schema.LAYERS, 27),
    "hidden_size": (schema.WIDTH, 1152),
    "intermediate_size": (schema.WIDTH, 4304),
    "out_hidden_size": (schema.WIDTH, 3584),
    "hidden_act": (fields_.ACTIVATION, "gelu_pytorch_tanh"),
    "patch_size": (schema.SIDE, 16),
    "num_position_embeddings": (schema.whole(1, 2**20), 2304),
    "deepstack_visual_indexes": (_NUMBERS, (8, 16, 24)),
}
TABLES = {"2": _QWEN2, "2.5": _QWEN2_5, "3": _QWEN3}  # by version
_ROPE = {
    "rope_type": (schema.only("axial", "default"), "axial"),  # the same in transformers
    "rope_theta": (schema.real(1, 1e12), 10000.0),
}
_IGNORED = fields_.IGNORED | {  # transformers reads none of them in an image tower
    "spatial_patch_size", "tie_word_embeddings", "tokens_per_second",
}  # fmt: skip

# Our sites under the prefix of the tower, like the `hf` column of `sites.TABLE` for CLIP. In
# Qwen3-VL no module returns `vision.embed`: it is the input of the first block.
SITES = {
    "vision.embed": "blocks.0 (input)",
    "vision.resid_pre": "blocks.{i} (input)",
    "vision.attn.heads": "blocks.{i}.attn.proj (input)",
    "vision.attn_out": "blocks.{i}.attn (output)",
    "vision.mlp.act": "blocks.{i}.mlp.act_fn (output); blocks.{i}.mlp.act (output)",
    "vision.mlp.out": "blocks.{i}.mlp (output)",
    "vision.resid_post": "blocks.{i} (output)",
}


def _flat_patches(config: QwenVisionConfig) -> keys.Transform:
    """[E, channel, frame, row, column] <-> [channel * frame * row * column, E]."""
    shape = (3, config.frames, config.patch, config.patch)
    return keys.Transform(
        "flat patches", lambda x: x.reshape(len(x), -1).T, lambda x: x.T.reshape(-1, *shape)
    )


def vision(hf: str, ours: str, config: QwenVisionConfig) -> tuple[keys.Row, ...]:
    """Return the key table of a tower, without its mergers."""
    up, down = ("linear_fc1", "linear_fc2") if config.table else ("fc1", "fc2")
    if config.gated:
        up, down = "up_proj", "down_proj"
    return keys.rows(
        hf,
        ours,
        ("patch_embed.proj.weight", "patch.kernel", _flat_patches(config)),
        ("patch_embed.proj.bias", "patch.bias", keys.COPY),
        ("pos_embed.weight", "position", keys.COPY),
    ) + keys.rows(
        f"{hf}.blocks.{{layer}}",
        f"{ours}.layers",
        *keys.norm("norm1", "norm1"),
        *keys.linear("attn.qkv", "attn.q", (0, 3)),
        *keys.linear("attn.qkv", "attn.k", (1, 3)),
        *keys.linear("attn.qkv", "attn.v", (2, 3)),
        *keys.linear("attn.proj", "attn.o"),
        *keys.norm("norm2", "norm2"),
        *keys.linear("mlp.gate_proj", "mlp.gate"),
        *keys.linear(f"mlp.{up}", "mlp.up"),
        *keys.linear(f"mlp.{down}", "mlp.down"),
    )


def read(fields: Mapping[str, Any], version: str, problems: list[str]) -> dict[str, Any]:
    """Return the fields of a `vision_config`; append what is wrong to `problems`.

    Args:
      fields: The content of the part.
      version: "2", "2.5" or "3".
      problems: A list to which problems are appended.
    """
    qwen = schema.read(fields, TABLES[version], _IGNORED, "vision_config.", problems)
    rope = qwen["rope_parameters"] or {}
    qwen |= schema.read(rope, _ROPE, (), "vision_config.rope_parameters.", problems)
    width = "embed_dim" if version == "2" else "hidden_size"
    heads = "4 x num_heads", 4 * qwen["num_heads"]  # rows and columns rotate a quarter of a head
    schema.divides(heads, (f"vision_config.{width}", qwen[width]), problems)
    if version == "2.5":
        merged = qwen["patch_size"] * qwen["spatial_merge_size"]
        part = "patch_size x spatial_merge_size", merged
        schema.divides(part, ("vision_config.window_size", qwen["window_size"]), problems)
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        layers = list(qwen.get(name, ()))
        if layers != sorted(set(layers)) or (layers and layers[-1] >= qwen["depth"]):
            depth = f"depth={qwen['depth']}"
            problems.append(f"vision_config.{name}={layers} are not layers in order below {depth}")
    places = qwen.get("num_position_embeddings", 1)
    if round(places**0.5) ** 2 != places:
        problems.append(f"vision_config.num_position_embeddings={places} is not a square")
    return qwen


def config(qwen: Mapping[str, Any], version: str) -> QwenVisionConfig:
    """Return the config of fields from `read`."""
    is_2 = version == "2"
    window = qwen.get("window_size")
    return QwenVisionConfig(
        width=qwen["embed_dim" if is_2 else "hidden_size"],
        layers=qwen["depth"],
        heads=qwen["num_heads"],
        mlp=int(qwen["embed_dim"] * qwen["mlp_ratio"]) if is_2 else qwen["intermediate_size"],
        patch=qwen["patch_size"],
        frames=qwen["temporal_patch_size"],
        merge=qwen["spatial_merge_size"],
        act=fields_.ACTIVATIONS[qwen["hidden_act"]],
        norm="rms" if version == "2.5" else "layer",
        gated=version == "2.5",
        patch_bias=version == "3",
        theta=float(qwen["rope_theta"]),
        table=round(qwen["num_position_embeddings"] ** 0.5) if version == "3" else 0,
        window=window // qwen["patch_size"] if window else None,
        full_layers=tuple(qwen.get("fullatt_block_indexes", ())),
        deepstack=tuple(qwen.get("deepstack_visual_indexes", ())),
    )


def to_hf(vision: QwenVisionConfig, version: str, out_width: int) -> dict[str, Any]:
    """Return the `vision_config` of a tower whose merger has the output width `out_width`, D."""
    shared = {
        "model_type": TABLES[version]["model_type"][1],
        "depth": vision.layers,
        "num_heads": vision.heads,
        "in_channels": 3,
        "patch_size": vision.patch,
        "spatial_merge_size": vision.merge,
        "temporal_patch_size": vision.frames,
        "hidden_act": fields_.HF_ACTIVATIONS[vision.act],
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.theta},
    }
    if version == "2":
        ratio = vision.mlp // vision.width
        return shared | {"embed_dim": vision.width, "hidden_size": out_width, "mlp_ratio": ratio}
    shared |= {
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp,
        "out_hidden_size": out_width,
    }
    if version == "2.5":
        window = (vision.window or 0) * vision.patch
        return shared | {
            "window_size": window, "fullatt_block_indexes": list(vision.full_layers),
        }  # fmt: skip
    return shared | {
        "num_position_embeddings": vision.table**2,
        "deepstack_visual_indexes": list(vision.deepstack),
    }
