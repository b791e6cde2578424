"""Tiny checkpoints of every kind of family, with a tokenizer of bytes, for whole studies."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

from mllm_jax import families
from mllm_jax.models import rotary
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.processors.processor import Processor
from tests.helpers import studies

# Unlike in shape: a tall one, a wide one, squares, one that is a single square of patches.
SIZES = ((40, 17), (24, 52), (33, 33), (8, 8), (30, 44), (24, 24), (40, 17), (24, 52))
LABELS = ("circle", "square", "stripe", "dot")  # of different first letters
TILES = 5  # along the longer side of a picture of Idefics3: more than the released models have
Made = tuple[MultimodalConfig, dict[str, Any]]


def _config(family: str, image_token: int, **lm: Any) -> MultimodalConfig:
    """A tiny config whose language model knows the tokenizer of bytes."""
    config = families.FAMILIES[family].config.tiny()
    lm = dataclasses.replace(config.lm, vocab=studies.LM.vocab, **lm)
    return dataclasses.replace(config, lm=lm, image_token=image_token)


def _square(family: str, image_token: int, kind: str) -> Made:
    config = _config(family, image_token)
    size = dict.fromkeys(("height", "width"), config.vision.image_size)
    return config, {"image_processor_type": kind, "size": size}


def _qwen(family: str, **lm: Any) -> Made:
    config = _config(family, 258, **lm)
    size = {"shortest_edge": 128, "longest_edge": 2048}
    kind = "Qwen2VLImageProcessor"
    return config, {"image_processor_type": kind, "patch_size": config.vision.patch, "size": size}


def _next() -> Made:
    config, how = _square("llava_next", 257, "LlavaNextImageProcessor")
    side, crop = config.vision.image_size, how.pop("size")
    how |= {"size": {"shortest_edge": side}, "crop_size": crop}
    return config, how | {"image_grid_pinpoints": [list(pair) for pair in config.pinpoints]}


def _onevision() -> Made:
    config, how = _square("llava_onevision", 257, "LlavaOnevisionImageProcessor")
    return config, how | {"image_grid_pinpoints": [list(pair) for pair in config.pinpoints]}


def _internvl() -> Made:
    config, how = _square("internvl", 258, "GotOcr2ImageProcessor")
    tiles = {"min_patches": config.min_tiles, "max_patches": config.max_tiles}
    return config, how | {"crop_to_patches": True} | tiles


def _idefics3() -> Made:
    config, how = _square("idefics3", 257, "Idefics3ImageProcessor")
    side = config.vision.image_size
    sides = {"size": {"longest_edge": TILES * side}, "max_image_size": {"longest_edge": side}}
    return config, how | sides


def _mistral3() -> Made:
    config = _config("mistral3", 258)
    kind, size = "PixtralImageProcessor", {"longest_edge": 64}
    return config, {"image_processor_type": kind, "patch_size": config.patch_side, "size": size}


FAMILIES: dict[str, Callable[[], Made]] = {
    "qwen2.5-vl": lambda: _qwen("qwen2_5_vl", rope_sections=rotary.RopeSections((2, 1, 1))),
    "gemma3": lambda: _square("gemma3", 258, "Gemma3ImageProcessor"),
    "paligemma": lambda: _square("paligemma", 257, "SiglipImageProcessor"),
    "idefics3": _idefics3,
    "mistral3": _mistral3,
    "gemma3-text": lambda: (_config("gemma3_text", -1), {}),
    "llava-next": _next,
    "onevision": _onevision,
    "internvl": _internvl,
    "qwen3-vl": lambda: _qwen("qwen3_vl"),
}


def write(family: str, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint of a family."""
    config, pictures = FAMILIES[family]()
    return studies.write_checkpoint(folder, config, **pictures)


def processor(family: str, folder: pathlib.Path) -> Processor:
    """The processor of a family alone; its tokenizer is written to the folder."""
    config, pictures = FAMILIES[family]()
    studies.write_tokenizer(folder, config)
    studies.write_json(folder / "preprocessor_config.json", pictures)
    return families.of(config).processor.from_directory(folder, config)


def write_domains(root: pathlib.Path, names: tuple[str, ...] = ("reds", "greens")) -> list[str]:
    """Domains of pictures of many shapes, each with labels in folders; their paths."""
    random = np.random.default_rng(0)
    for channel, name in enumerate(names):
        for label in LABELS:
            folder = root / name / label
            folder.mkdir(parents=True)
            for i, (height, width) in enumerate(SIZES):
                pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    return [str(root / name) for name in names]
