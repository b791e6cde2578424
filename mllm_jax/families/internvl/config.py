"""Convert between the `config.json` of InternVL, as transformers has it, and its config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder, internvit
from mllm_jax.families.internvl.model import InternVlConfig

_TYPES = ("qwen2", "qwen3", "llama")
_RATIOS = {0.5: 2, 1.0: 1, 0.25: 4}  # the share of a side that remains -> what is folded
_TILES = {
    "min_dynamic_patch": (schema.whole(1, 64), 1),
    "max_dynamic_patch": (schema.whole(1, 64), 12),
}
# The fields that are read, with the default of transformers.
_FIELDS = fields_.TOKEN_IDS | {
    "model_type": (schema.only("internvl"), "internvl"),
    "image_token_index": (schema.ID, 151667),
    "downsample_ratio": (schema.only(*_RATIOS), 0.5),
    "projector_hidden_act": (fields_.ACTIVATION, "gelu"),
    "vision_feature_layer": (schema.whole(-1024, 1024), -1),
    "vision_feature_select_strategy": (schema.only("default"), "default"),
    "tie_word_embeddings": (schema.optional(schema.FLAG), None),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
    # Fields of the original code; transformers has them in the image processor.
    **_TILES,
}  # fmt: skip


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> InternVlConfig:
    """Read the config of an InternVL checkpoint; see `from_hf` of LLaVA."""
    problems: list[str] = []
    internvl = schema.read(fields_.renamed(fields), _FIELDS, fields_.IGNORED, "", problems)
    tower = internvit.read(internvl["vision_config"] or {}, problems)
    given = _without_dynamic_scaling(internvl["text_config"] or {})
    text = decoder.read(given, problems, types=_TYPES, default="qwen2")
    layers, at = tower["num_hidden_layers"], internvl["vision_feature_layer"]
    if not (1 <= at <= layers or -layers <= at <= -1):
        problems.append(f"vision_feature_layer={at}: the vision tower has {layers} layers")
    fold = _RATIOS[internvl["downsample_ratio"]]
    grid = "vision_config.image_size / patch_size", tower["image_size"] // tower["patch_size"]
    schema.divides(("1 / downsample_ratio", fold), grid, problems)
    low, high = (internvl[name] for name in _TILES)
    if low > high:
        problems.append(f"min_dynamic_patch={low} is above max_dynamic_patch={high}")
    tied = internvl["tie_word_embeddings"]
    tied = given.get("tie_word_embeddings", True) if tied is None else tied
    return fields_.checked(
        lambda: InternVlConfig.of(
            internvit.config(tower, feature_layer=at),
            decoder.config(text, tied=bool(tied)),
            fold=fold,
            act=fields_.ACTIVATIONS[internvl["projector_hidden_act"]],
            image_token=internvl["image_token_index"],
            min_tiles=low,
            max_tiles=high,
        ),
        source,
        problems,
    )


def _without_dynamic_scaling(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `text_config` without "dynamic" scaling.

    It changes only rows longer than `max_position_embeddings` (32,768), and released models have it
    in their config.
    """

    def is_dynamic(value: object) -> bool:
        return isinstance(value, Mapping) and "dynamic" in (
            value.get("rope_type"), value.get("type"),
        )  # fmt: skip

    changed = dict(text)
    for name in ("rope_scaling", "rope_parameters"):
        part = changed.get(name)
        if is_dynamic(part):
            assert isinstance(part, Mapping)
            kept = {"rope_theta": part["rope_theta"]} if "rope_theta" in part else None
            changed[name] = kept
    return changed


def to_hf(config: InternVlConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    projector, tiles = config.projector, (config.min_tiles, config.max_tiles)
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "image_token_id": config.image_token,
        "image_seq_length": config.image_tokens,
        "downsample_ratio": 1 / projector.fold,
        "projector_hidden_act": fields_.HF_ACTIVATIONS[projector.act],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.lm.tied,
        **{n: v for (n, (_, usual)), v in zip(_TILES.items(), tiles, strict=True) if v != usual},
        "vision_config": internvit.to_hf(config.vision),
        "text_config": decoder.to_hf(config.lm),
    }
