"""Load CLIP checkpoints with both towers: their config, key table and processor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, schema
from mllm_jax.checkpoints.networks import clip, encoder
from mllm_jax.loading import load as load_
from mllm_jax.loading import settings, sources
from mllm_jax.models.clip_text import Clip, ClipPairConfig, ClipTextConfig
from mllm_jax.processors.clip import ClipProcessor

# The fields that are read, with the default of transformers.
_PAIR = {
    "model_type": (schema.only("clip"), "clip"),
    "projection_dim": (schema.WIDTH, 512),
    "text_config": (schema.PART, None),
    "text_config_dict": (schema.PART, None),
    "vision_config": (schema.PART, None),
    "vision_config_dict": (schema.PART, None),
}
_TEXT = {
    **encoder.table(
        "clip_text_model",
        vocab_size=49408,
        max_position_embeddings=77,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    "eos_token_id": (schema.ID, 49407),
}
# The scale is a tensor of the checkpoint.
_IGNORED = fields_.IGNORED | {"logit_scale_init_value", "tie_word_embeddings"}
_HIGHEST_ID = 2  # in configs before transformers 4.31: the end token has the highest id of a row

TABLE = (
    *clip.vision("vision_model", "vision"),
    keys.Row("vision_model.post_layernorm.weight", "vision_norm.scale", keys.COPY),
    keys.Row("vision_model.post_layernorm.bias", "vision_norm.bias", keys.COPY),
    keys.Row("visual_projection.weight", "vision_out.kernel", keys.LINEAR),
    *keys.rows(
        "text_model",
        "text",
        ("embeddings.token_embedding.weight", "words", keys.COPY),
        ("embeddings.position_embedding.weight", "position", keys.COPY),
        *keys.norm("final_layer_norm", "norm"),
    ),
    *clip.layers("text_model", "text"),
    keys.Row("text_projection.weight", "text_out.kernel", keys.LINEAR),
    keys.Row("logit_scale", "scale", keys.COPY),
)


def load(name: str | os.PathLike) -> tuple[Clip, ClipProcessor]:
    """Load a CLIP model in float32, and its processor.

    Args:
      name: A directory or a hub id such as "openai/clip-vit-large-patch14-336".

    Raises:
      FileNotFoundError: There is no such checkpoint, or a part of it is missing.
      ValueError: It is not a CLIP checkpoint with both towers; the message lists all problems.
    """
    directory = sources.locate(name)
    config = from_hf(sources.read_fields(directory), directory / "config.json")
    settings.check(directory, directory, config.vision.image_size)
    model = load_.read_network(lambda: Clip(config, rngs=nnx.Rngs(0)), TABLE, directory, "float32")
    return model, ClipProcessor.from_directory(directory, config)


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> ClipPairConfig:
    """Return the config of a CLIP checkpoint; see `families.from_hf`."""
    problems: list[str] = []
    pair = schema.read(fields, _PAIR, _IGNORED, "", problems)
    vision = clip.read(_part(pair, "vision_config"), problems)
    text = encoder.read(_part(pair, "text_config"), _TEXT, _IGNORED, "text_config.", problems)
    return fields_.checked(lambda: _config(pair, vision, text), source, problems)


def _part(pair: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the config of a tower; the older field takes precedence, as in transformers."""
    older = pair[f"{name}_dict"]
    return (pair[name] or {}) if older is None else older


def _config(pair: Mapping, vision: Mapping, text: Mapping) -> ClipPairConfig:
    end = text["eos_token_id"]
    return ClipPairConfig(
        vision=clip.config(vision, feature_layer=-1, select="full"),
        text=ClipTextConfig(**encoder.arguments(text), end=None if end == _HIGHEST_ID else end),
        width=pair["projection_dim"],
    )
