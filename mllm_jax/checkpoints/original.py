"""The layout of the original LLaVA code (Liu et al. 2023), as `liuhaotian/llava-v1.5-7b` has it.

Its `config.json` is that of the language model with further fields `mm_...`; the vision tower is a
CLIP checkpoint of its own that the config names; and a projector may come alone, in
`mm_projector.bin`, as pretraining leaves it. The tensors keep their names (`tables.canonical`).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from mllm_jax.models.llava import LlavaConfig

PROJECTOR = "mm_projector.bin"

# model_type -> that of the language model
_LANGUAGE = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
_SELECT = {"patch": "default", "cls_patch": "full"}
# The fields that may hold one thing only, because we have no other; None where they are absent.
_FIXED = {
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "use_mm_proj": (True, None),
}
_PINPOINTS = "image_grid_pinpoints"
_SQUARE = {"image_aspect_ratio": ("pad", "square", None), "mm_patch_merge_type": ("flat", None)}
_TILED = {"image_aspect_ratio": ("anyres",), "mm_patch_merge_type": ("spatial_unpad",)}
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
    """Whether a `config.json` is of this layout."""
    return "mm_vision_tower" in fields


def to_hf(fields: Mapping[str, Any], tower: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The same model as the fields of a `config.json` of transformers.

    Args:
        fields: of the original `config.json`.
        tower: of the `config.json` of the vision tower, with or without its text half.
        source: what to call the file in an error.

    Returns:
        The fields, for `config.from_hf`; what is not known here stands in `text_config`. The
        original code has no id for an image token; ours is the first after the vocabulary, which
        the tokenizer gives to `<image>` when it is added.

    Raises:
        ValueError: values that we do not support, all in one line.
    """
    fields = {name: value for name, value in fields.items() if name not in _IGNORED}
    vision = tower.get("vision_config", tower)
    tiled = fields.get("mm_patch_merge_type") == "spatial_unpad"
    fixed = _FIXED | (_TILED if tiled else _SQUARE)
    problems = [
        f"{name}={value!r} is not supported, only {only[0]!r}"
        for name, only in fixed.items()
        if (value := fields.pop(name, None)) not in only
    ]
    projector = fields.pop("mm_projector_type", "linear")
    depth = re.fullmatch(r"mlp(\d+)x_gelu", projector)
    if not depth and projector != "linear":
        problems.append(
            f"mm_projector_type={projector!r} is not supported, only 'linear', 'mlp2x_gelu'"
        )
    select = fields.pop("mm_vision_select_feature", "patch")
    if select not in _SELECT:
        problems.append(f"mm_vision_select_feature={select!r} is not supported, only 'patch'")
    width = fields.pop("mm_hidden_size", None)
    if width not in (None, vision.get("hidden_size")):
        problems.append(
            f"mm_hidden_size={width}, but {fields['mm_vision_tower']} has hidden_size="
            f"{vision.get('hidden_size')}"
        )
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")
    model_type, pinpoints = fields.pop("model_type", "llava"), fields.pop(_PINPOINTS, None)
    del fields["mm_vision_tower"]
    kind = {"model_type": "llava_next", _PINPOINTS: pinpoints} if tiled else {"model_type": "llava"}
    return {
        **kind,
        "image_token_index": fields.get("vocab_size", 32000),
        "projector_depth": int(depth[1]) if depth else 1,
        "vision_feature_layer": fields.pop("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _SELECT[select],
        "vision_config": dict(vision),
        "text_config": {**fields, "model_type": _LANGUAGE.get(model_type, model_type)},
    }


def image_processor(tower: pathlib.Path, config: LlavaConfig):
    """The image processor of transformers (PIL backend) that does what the original code does.

    Args:
        tower: the directory of the vision tower, whose settings these are.
        config: of the model.
    """
    from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil  # when needed

    if not config.pinpoints:
        return CLIPImageProcessorPil.from_pretrained(tower)
    sizes = [list(size) for size in config.pinpoints]
    return LlavaNextImageProcessorPil.from_pretrained(tower, image_grid_pinpoints=sizes)
