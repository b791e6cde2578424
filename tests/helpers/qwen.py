"""Tiny random checkpoints of the Qwens, made and saved by transformers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib

import numpy as np
import PIL.Image

from mllm_jax import families, tokens
from mllm_jax.batch import Batch
from mllm_jax.checkpoints.networks import qwen_vision
from mllm_jax.families.qwen2_5_vl.processor import QwenVLProcessor
from tests.helpers import hf, tiny
from tests.helpers.family import Family

# What the hub has, without video and tools.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nyou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE_3 = TEMPLATE.replace(  # Qwen3-VL has no system prompt of its own
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nyou are a helpful assistant.<|im_end|>\n{% endif %}",
    "",
)
NAMES = (
    "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|video_pad|>", "<|image_pad|>",
)  # fmt: skip
WRITTEN = "<|vision_start|><|image_pad|><|vision_end|>"
NAME = {"2": "Qwen2VL", "2.5": "Qwen2_5_VL", "3": "Qwen3VL"}
FOLDER = {"2": "qwen2_vl", "2.5": "qwen2_5_vl", "3": "qwen3_vl"}
LIMITS = {"shortest_edge": 128, "longest_edge": 2048}  # 2 to 32 tokens
_MERGER = {"2": "merger.mlp.1", "2.5": "merger.mlp.1", "3": "merger.act_fn"}


def checkpoint(version: str, directory: pathlib.Path, *, seed: int = 0, **changes) -> Family:
    """A checkpoint of a version; `changes` are to its language model."""
    config = families.FAMILIES[FOLDER[version]].config.tiny()
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, **changes))
    network = network_of(config)
    hf.random(network, seed)
    if config.lm.tied:
        network.tie_weights()
    network.save_pretrained(directory)
    processor = processor_of(config)
    processor.save_pretrained(directory)
    where = {name: f"model.visual.{place}".replace("; ", "; model.visual.")
             for name, place in qwen_vision.SITES.items()}  # fmt: skip
    where["projector.act"] = f"model.visual.{_MERGER[version]} (output)"
    where["projector.out"] = "model.visual.merger (output)"
    return Family(
        config, network, processor, directory, written=WRITTEN, begins="<|im_start|>",
        where=where, untold=frozenset({"vision.attn.pattern"}), is_automatic=False,
        inputs=inputs, placed=placed,
    )  # fmt: skip


def network_of(config) -> hf.torch.nn.Module:
    """Their network of one of our configs, with random weights."""
    folder, name = FOLDER[config.version], NAME[config.version]
    fields = families.of(config).to_hf(config)
    kind, made = fields.pop("model_type"), fields.pop("architectures")
    assert (kind, made) == (folder, [f"{name}ForConditionalGeneration"])
    special = {"video_token_id": 90, "vision_start_token_id": 3, "vision_end_token_id": 4}
    fields["text_config"] |= {"bos_token_id": None, "eos_token_id": None}
    settings = getattr(hf.transformers, f"{name}Config")(**fields, **special, **hf.ATTENTION)
    return getattr(hf.transformers, made[0])(settings)


class TheirProcessor:
    """Their processor without video: theirs cannot be made without torchvision."""

    def __init__(self, image_processor, tokenizer, kind):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token = "<|image_pad|>"
        self._replace = functools.partial(kind.replace_image_token, self)

    def __call__(self, images, text, return_tensors="np"):
        made, parts = {}, [text]
        if images:
            made = dict(self.image_processor(images, return_tensors=return_tensors))
            parts = text.split(self.image_token)
            assert len(parts) == len(images) + 1
        repeated = [self._replace(made, number) for number in range(len(parts) - 1)] + [""]
        whole = "".join(a + b for a, b in zip(parts, repeated, strict=True))
        return {**self.tokenizer([whole], return_tensors=return_tensors), **made}

    def apply_chat_template(self, turns, add_generation_prompt):
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def save_pretrained(self, directory):
        self.image_processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def processor_of(config) -> TheirProcessor:
    folder = FOLDER[config.version]
    kind = "Qwen3VLProcessor" if config.version == "3" else "Qwen2VLProcessor"
    module = importlib.import_module(
        f"transformers.models.{folder}.processing_{folder}"
        if config.version != "2.5"
        else "transformers.models.qwen2_vl.processing_qwen2_vl"
    )
    tokenizer = tiny.tokenizer(
        config, TEMPLATE_3 if config.version == "3" else TEMPLATE, begin=False, names=NAMES,
        words="system you are helpful", eos_token="<|im_end|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    images = hf.transformers.Qwen2VLImageProcessorPil(
        patch_size=config.vision.patch, size=dict(LIMITS)
    )
    return TheirProcessor(images, tokenizer, getattr(module, kind))


def processor(config) -> QwenVLProcessor:
    """Our processor of one of our tiny configs."""
    theirs = processor_of(config)
    return QwenVLProcessor(theirs.tokenizer, lambda: theirs.image_processor, config)


def inputs(batch: Batch, pictures: list[list[PIL.Image.Image]]) -> dict[str, np.ndarray]:
    """A batch of ours as their network wants it; it makes the positions itself."""
    del pictures
    attention = batch.valid.astype(int)
    attention[~batch.valid.any(1), 0] = 1  # they cannot have an empty row
    found = {
        "input_ids": batch.ids.astype(int),
        "attention_mask": attention,
        "mm_token_type_ids": (batch.tokens.kind == tokens.CODE["image"]).astype(int),
    }
    real = batch.is_real_tile
    if real.any():
        found["pixel_values"] = batch.pixels[_is_patch(batch)]
        found["image_grid_thw"] = np.insert(batch.grid[real], 0, 1, 1).astype(int)
    return found


def _is_patch(batch: Batch, fold: int = 1) -> np.ndarray:
    """bool[I, P], whether a place has a patch, or a square of `fold` of them."""
    count = batch.grid.prod(1) // fold
    return np.arange(batch.pixels.shape[1] // fold) < count[:, None]


def placed(want: dict[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    """Tensors of their tower, which has all pictures in one row, at the places of the batch."""
    config = batch.processor.config
    fold = config.merge**2
    squares = np.flatnonzero(_is_patch(batch, fold))
    if config.vision.window:  # theirs come window by window
        utils = importlib.import_module("transformers.vision_utils")
        index, _ = utils.get_vision_window_index(
            hf.torch.from_numpy(inputs(batch, [])["image_grid_thw"]),
            spatial_merge_size=config.merge,
            window_size=config.vision.window * config.vision.patch,
            patch_size=config.vision.patch,
        )
        squares = squares[index.numpy()]
    patches = (squares[:, None] * fold + np.arange(fold)).reshape(-1)

    def one(name: str, array: np.ndarray) -> np.ndarray:
        if name.startswith(("lm.", "logits")):
            return array
        at = patches if name.startswith("vision.") else squares
        count = batch.pixels.shape[1] // (1 if name.startswith("vision.") else fold)
        axis = hf.sites.get(name).stacked
        lead, tail = array.shape[:axis], array.shape[axis + 1 :]
        out = np.zeros((*lead, len(batch.grid) * count, *tail), array.dtype)
        out[(slice(None),) * axis + (at,)] = array
        return out.reshape(*lead, len(batch.grid), count, *tail)

    return {name: one(name, array) for name, array in want.items()}
