"""Read the layout of the original LLaVA code (Liu et al. 2023): `liuhaotian/llava-v1.5-7b`.

Its `config.json` is that of the language model with additional fields `mm_...`. The vision tower is
a separate CLIP checkpoint that the config names. A projector may be stored alone, in
`mm_projector.bin`, the result of pretraining. `keys.canonical_key` maps the names of tensors.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from mllm_jax import files
from mllm_jax.checkpoints import schema
from mllm_jax.families.base import OriginalLayout
from mllm_jax.families.llava import keys
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.processors import image_processors

_TOWER = "mm_vision_tower"
# The model_type of the language model by that of the whole.
_LANGUAGE = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
_SELECT = {"patch": "default", "cls_patch": "full"}
_PINPOINTS = "image_grid_pinpoints"
_PROJECTOR_TYPE = re.compile(r"linear|mlp([1-9]|1[0-6])x_gelu")
# The fields that are read, with the default of the original code.
_FIELDS = {
    _TOWER: (schema.NAME, None),
    "mm_projector_type": (
        schema.Kind(
            "'linear', 'mlp2x_gelu' and up to 'mlp16x_gelu'",
            lambda value: isinstance(value, str) and bool(_PROJECTOR_TYPE.fullmatch(value)),
        ),
        "linear",
    ),
    "mm_hidden_size": (schema.optional(schema.WIDTH), None),
    "mm_vision_select_feature": (schema.only(*_SELECT), "patch"),
    "mm_vision_select_layer": (schema.whole(-1024, 1024), -2),
    "mm_resampler_type": (schema.only(None), None),
    "mm_use_im_start_end": (schema.only(False, None), None),
    "use_mm_proj": (schema.only(True, None), None),
}
_SQUARE = {
    "image_aspect_ratio": (schema.only("pad", "square", None), None),
    "mm_patch_merge_type": (schema.only("flat", None), None),
}
_TILED = {
    "image_aspect_ratio": (schema.only("anyres"), "anyres"),
    "mm_patch_merge_type": (schema.only("spatial_unpad"), "spatial_unpad"),
}
# The fields that do not change what a trained model computes.
_IGNORED = frozenset(
    """
    freeze_backbone freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution
    image_split_resolution mm_projector_lr mm_use_im_patch_token mm_vision_tower_lr
    pretrain_mm_mlp_adapter tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter
    tune_mm_vision_resampler unfreeze_mm_vision_tower
    """.split()  # noqa: SIM905
)


def is_original(fields: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` is of this layout."""
    return _TOWER in fields


def to_hf(fields: Mapping[str, Any], tower: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Return the fields of a `config.json` of transformers for the same model.

    Args:
      fields: The fields of the original `config.json`.
      tower: The fields of the `config.json` of the vision tower, with or without a text tower.
      source: The name of the file, for the error.

    Returns:
      The fields, for `config.from_hf`; unknown fields are in `text_config`. The original code has
      no id for an image token; this one is the first after the vocabulary, which the tokenizer
      assigns to `<image>`.

    Raises:
      ValueError: values are not supported; the message lists all.
    """
    problems: list[str] = []
    tiled = fields.get("mm_patch_merge_type") == "spatial_unpad"
    table = _FIELDS | (_TILED if tiled else _SQUARE)
    ours = schema.values(fields, table, "", problems)
    text = {n: value for n, value in fields.items() if n not in _IGNORED and n not in table}
    vision = tower.get("vision_config", tower)
    if not isinstance(vision, Mapping):
        problems.append(f"{files.shown(ours[_TOWER])} has no object as vision_config")
        vision = {}
    width, theirs = ours["mm_hidden_size"], vision.get("hidden_size")
    if width not in (None, theirs):
        name = files.shown(ours["mm_vision_tower"])
        problems.append(f"mm_hidden_size={width}, but {name} has {files.shown(theirs)}")
    if problems:
        raise ValueError(files.refusal(source, problems))
    model_type, pinpoints = text.pop("model_type", "llava"), text.pop(_PINPOINTS, None)
    if isinstance(model_type, str):
        model_type = _LANGUAGE.get(model_type, model_type)
    match = _PROJECTOR_TYPE.fullmatch(ours["mm_projector_type"])
    depth = match and match[1]
    kind = {"model_type": "llava_next", _PINPOINTS: pinpoints} if tiled else {"model_type": "llava"}
    return {
        **kind,
        "image_token_index": text.get("vocab_size", 32000),
        "projector_depth": int(depth or 1),
        "vision_feature_layer": ours["mm_vision_select_layer"],
        "vision_feature_select_strategy": _SELECT[ours["mm_vision_select_feature"]],
        "vision_config": dict(vision),
        "text_config": {**text, "model_type": model_type},
    }


def image_processor(tower: pathlib.Path, config: MultimodalConfig):
    """Return the image processor of transformers (PIL backend) that equals the original one.

    Args:
      tower: The directory of the vision tower, which contains the settings.
      config: The config of the model.
    """
    from transformers import (
        CLIPImageProcessorPil,
        LlavaNextImageProcessorPil,
    )  # imported when needed

    options: dict[str, Any] = {}
    if config.pinpoints:
        options["image_grid_pinpoints"] = [list(size) for size in config.pinpoints]
    kind = LlavaNextImageProcessorPil if config.pinpoints else CLIPImageProcessorPil
    path = tower / "preprocessor_config.json"
    return image_processors.construct(path, lambda: kind.from_pretrained(tower, **options))


LAYOUT = OriginalLayout(
    is_original=is_original,
    to_hf=to_hf,
    image_processor=image_processor,
    tower_field=_TOWER,
    base_field="_name_or_path",
    projector_file="mm_projector.bin",
    projector_keys=keys.original_projector_keys,
    tower_key=keys.tower_key,
)
