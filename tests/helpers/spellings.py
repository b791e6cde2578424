"""The layouts that LLaVA checkpoints are met in, made of one: the key spellings, the original one."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

Rename = tuple[tuple[str, str], ...]

# From the keys of the hub's files to those of others, by regular expressions, the first that fits.
SPELLINGS: dict[str, Rename] = {
    "hub": (),
    "transformers-4.5x-memory": (
        (r"^vision_tower\.", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    "transformers-5-disk": ((r"^vision_tower\.vision_model\.", "vision_tower."),),
    "transformers-5-memory": (
        (r"^vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    "original": (
        (r"^vision_tower\.", "model.vision_tower.vision_tower."),
        (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^image_newline", "model.image_newline"),
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
}


def spell(tensors: Mapping[str, Any], spelling: str) -> dict[str, Any]:
    """Tensors under the keys of another spelling, from those of the hub."""

    def name(key: str) -> str:
        for pattern, spelled in SPELLINGS[spelling]:
            if re.search(pattern, key):
                return re.sub(pattern, spelled, key)
        return key

    return {name(key): tensor for key, tensor in tensors.items()}


def write_original(
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    directory: pathlib.Path,
    write: Callable[[dict[str, Any], pathlib.Path], None],
) -> pathlib.Path:
    """Writes a LLaVA as `liuhaotian/llava-v1.5-7b` is: shards of `.bin`, a CLIP directory.

    Args:
      tensors: By the keys of the hub.
      config: The `config.json` of transformers.
      directory: A new directory. It will hold `model`, `clip` and, as pretraining leaves it,
        `pretrain` with the projector alone.
      write: Of tensors to a `.bin` file.

    Returns:
      The directory `model`.
    """
    places = {name: directory / name for name in ("model", "clip", "pretrain")}
    for place in places.values():
        place.mkdir(parents=True)
    vision = {k: t for k, t in tensors.items() if k.startswith("vision_tower.")}
    rest = spell({k: t for k, t in tensors.items() if k not in vision}, "original")
    projector = {key: tensor for key, tensor in rest.items() if "mm_projector" in key}
    names = [f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2)]
    for n, name in enumerate(names):
        write({key: rest[key] for key in sorted(rest)[n::2]}, places["model"] / name)
    index = {key: names[n % 2] for n, key in enumerate(sorted(rest))}
    _json({"weight_map": index}, places["model"] / "pytorch_model.bin.index.json")
    write(
        {key.removeprefix("vision_tower."): t for key, t in vision.items()},
        places["clip"] / "pytorch_model.bin",
    )
    _json({"model_type": "clip", "vision_config": config["vision_config"]}, places["clip"])
    write(projector, places["pretrain"] / "mm_projector.bin")
    fields = {
        **config["text_config"],
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config["vision_feature_layer"],
        "mm_vision_tower": str(places["clip"]),
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    _json(fields, places["model"])
    _json(fields | {"_name_or_path": str(places["model"])}, places["pretrain"])
    return places["model"]


def _json(fields: Mapping[str, Any], path: pathlib.Path) -> None:
    path = path if path.suffix == ".json" else path / "config.json"
    path.write_text(json.dumps(fields))
