"""Transformer encoders (towers of CLIP and EVA, Q-Formers): the fields that their configs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema

# The name in transformers -> the attribute of a config class, and the kind of value.
_FIELDS = {
    "vocab_size": ("vocab", schema.WORDS),
    "hidden_size": ("width", schema.WIDTH),
    "intermediate_size": ("mlp", schema.WIDTH),
    "num_hidden_layers": ("layers", schema.LAYERS),
    "num_attention_heads": ("heads", schema.HEADS),
    "image_size": ("image_size", schema.SIDE),
    "patch_size": ("patch", schema.SIDE),
    "hidden_act": ("act", fields_.ACTIVATION),
    "max_position_embeddings": ("positions", schema.whole(1, 2**20)),
    "layer_norm_eps": ("eps", schema.EPSILON),
}
CHANNELS = {"num_channels": (schema.only(3), 3)}  # a further field of vision towers


def table(model_type: str, **defaults: Any) -> dict[str, tuple[schema.Kind, Any]]:
    """Return the table of the fields of an encoder.

    Args:
      model_type: The `model_type` of its config.
      **defaults: The defaults of transformers; fields without a default are not read.
    """
    fields = {name: (_FIELDS[name][1], default) for name, default in defaults.items()}
    return {"model_type": (schema.only(model_type), model_type), **fields}


def read(
    fields: Mapping[str, Any],
    table: schema.Table,
    ignored: Collection[str],
    prefix: str,
    problems: list[str],
) -> dict[str, Any]:
    """Return the fields of an encoder as `schema.read` does, and check that its sizes fit."""
    known = schema.read(fields, table, ignored, prefix, problems)
    for part, whole in (("num_attention_heads", "hidden_size"), ("patch_size", "image_size")):
        if part in known:
            schema.divides((part, known[part]), (f"{prefix}{whole}", known[whole]), problems)
    return known


def check_feature_layer(tower: Mapping[str, Any], at: int, problems: list[str]) -> None:
    """Append to `problems` if a tower does not have the hidden state that is used.

    Args:
      tower: The fields of the tower.
      at: The number of the hidden state; 0, the embedding, is not supported.
      problems: A list to which problems are appended.
    """
    layers = tower["num_hidden_layers"]
    if not (1 <= at <= layers or -layers <= at <= -1):
        problems.append(
            f"vision_feature_layer={at}: the vision tower has {layers} layers, so only "
            f"1 to {layers} or -{layers} to -1 are supported"
        )


def arguments(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a config class from the fields of `read`."""
    given = {ours: known[name] for name, (ours, _) in _FIELDS.items() if name in known}
    return given | {"act": fields_.ACTIVATIONS[known["hidden_act"]]}


def to_hf(config: Any, model_type: str) -> dict[str, Any]:
    """Return the fields of a config of an encoder; the inverse of `arguments`."""
    own = {field.name for field in dataclasses.fields(config)}
    fields = {name: getattr(config, ours) for name, (ours, _) in _FIELDS.items() if ours in own}
    return {
        "model_type": model_type,
        **fields,
        "hidden_act": fields_.HF_ACTIVATIONS[config.act],
    }
