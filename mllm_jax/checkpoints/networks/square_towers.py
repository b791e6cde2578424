"""Towers that read square pictures at one hidden layer, by the model type of a `vision_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax import files
from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import clip, encoder, siglip
from mllm_jax.models.clip import ClipConfig
from mllm_jax.models.siglip import SiglipConfig

_TYPES = {"clip_vision_model": clip, "siglip_vision_model": siglip}


def read(
    fields: Mapping[str, Any], problems: list[str], *, default: str = "clip_vision_model"
) -> dict[str, Any]:
    """Return the fields of a `vision_config` for `config`; append what is wrong to `problems`.

    Args:
      fields: The content of a `vision_config`.
      problems: A list to which problems are appended.
      default: The model type if the fields do not state it.
    """
    kind = fields.get("model_type", default)
    if not isinstance(kind, str) or kind not in _TYPES:
        problems.append(
            f"vision_config.model_type={files.shown(kind)} is not supported, "
            f"only {', '.join(_TYPES)}"
        )
        return _TYPES[default].read({}, problems)
    return _TYPES[kind].read({**fields, "model_type": kind}, problems)


def check(tower: Mapping[str, Any], feature_layer: int, select: str, problems: list[str]) -> None:
    """Append to `problems` if the tower does not have the layer or the tokens that are used.

    Args:
      tower: The fields from `read`.
      feature_layer: The hidden state that is used; 0, the embedding, is not supported.
      select: The tokens that are used, see `config`.
      problems: A list to which problems are appended.
    """
    encoder.check_feature_layer(tower, feature_layer, problems)
    if select == "patch" and tower["model_type"] == "siglip_vision_model":
        problems.append(
            "vision_feature_select_strategy='default' drops the first token, which is a patch in "
            "SigLIP: only 'full' is supported"
        )


def config(
    tower: Mapping[str, Any], *, feature_layer: int, select: str
) -> ClipConfig | SiglipConfig:
    """Return the config of fields from `read`.

    Args:
      tower: The fields.
      feature_layer: The hidden state that is used.
      select: "patch" drops a CLS token, "full" keeps it.
    """
    if tower["model_type"] == "clip_vision_model":
        return clip.config(tower, feature_layer=feature_layer, select=select)
    return siglip.config(tower, feature_layer=feature_layer)


def to_hf(vision: ClipConfig | SiglipConfig) -> dict[str, Any]:
    """Return the `vision_config` of a tower that ends at the layer whose output is used."""
    return clip.to_hf(vision) if isinstance(vision, ClipConfig) else siglip.to_hf(vision)


def table(vision: ClipConfig | SiglipConfig, hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of a tower."""
    return clip.vision(hf, ours) if isinstance(vision, ClipConfig) else siglip.vision(hf, ours)
