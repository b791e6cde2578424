"""Tiny random checkpoints of Mistral 3 and Pixtral, made and saved by transformers."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import PIL.Image

from mllm_jax import families
from mllm_jax.batch import Batch
from mllm_jax.checkpoints.networks import pixtral
from mllm_jax.families.mistral3.processor import Mistral3Processor
from tests.helpers import hf, tiny
from tests.helpers.family import Family

# What the hub has, without tools and system prompts.
TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{%- if message['content'] is string %}{{- '[INST]' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST]' }}{%- for block in message['content'] %}"
    "{%- if block['type'] == 'text' %}{{- block['text'] }}"
    "{%- elif block['type'] in ['image', 'image_url'] %}{{- '[IMG]' }}{%- endif %}{%- endfor %}"
    "{{- '[/INST]' }}{%- endif %}{%- elif message['role'] == 'assistant' %}"
    "{%- if message['content'] is string %}{{- message['content'] + eos_token }}"
    "{%- else %}{{- message['content'][0]['text'] + eos_token }}{%- endif %}{%- endif %}"
    "{%- endfor %}"
)
NAMES = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]", "[IMG]")
CLASS = {"mistral3": "Mistral3", "llava_pixtral": "Llava"}
LONGEST = 100


def checkpoint(
    kind: str, directory: pathlib.Path, tied: bool = False, merge: int | None = None, **changes
) -> Family:
    """A checkpoint of a family; `changes` are to its language model."""
    config = families.FAMILIES[kind].config.tiny()
    lm = dataclasses.replace(config.lm, tied=tied, **changes)
    vision = dataclasses.replace(config.vision, merge=merge or config.merge)
    config = type(config).of(vision, lm, image_token=config.image_token)
    network = network_of(config)
    hf.random(network)
    if tied:
        network.tie_weights()
        with hf.torch.no_grad():  # a factor below zero; else each token predicts itself
            network.model.language_model.norm.weight.neg_()
    network.save_pretrained(directory)
    processor = processor_of(config)
    processor.save_pretrained(directory)
    where = {name: f"model.vision_tower.{place}" for name, place in pixtral.SITES.items()}
    return Family(
        config, network, processor, directory, written="[IMG]", begins="<s> [INST]", where=where,
        untold=frozenset({"vision.attn.pattern"}), is_automatic=False, inputs=inputs, placed=placed,
    )  # fmt: skip


def network_of(config) -> hf.torch.nn.Module:
    """Their network of one of our configs."""
    family = families.of(config)
    fields = family.to_hf(config)
    fields.pop("model_type")
    (made,) = fields.pop("architectures")
    assert made == f"{CLASS[family.name]}ForConditionalGeneration"
    fields["text_config"] |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = getattr(hf.transformers, f"{CLASS[family.name]}Config")(**fields, **hf.ATTENTION)
    return getattr(hf.transformers, made)(settings)


class TheirProcessor:
    """Their processor, its `replace_image_token` restated: its file needs torchvision."""

    def __init__(self, image_processor, tokenizer, config):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.patch_size, self.spatial_merge_size = config.patch_side, config.merge
        self.image_token, self.image_break_token, self.image_end_token = "[IMG]", *NAMES[5:7]

    def __call__(self, images, text, return_tensors="np", **how):
        made, parts = {}, [text]
        if images:
            side = self.patch_size * self.spatial_merge_size
            made = dict(
                self.image_processor(images, patch_size=side, return_tensors=return_tensors)
            )
            parts = text.split(self.image_token)
            assert len(parts) == len(images) + 1
        rows = [self._replace(made, number) for number in range(len(parts) - 1)] + [""]
        whole = "".join(a + b for a, b in zip(parts, rows, strict=True))
        return {**self.tokenizer([whole], return_tensors=return_tensors, **how), **made}

    def _replace(self, made, number):
        side = self.patch_size * self.spatial_merge_size
        height, width = made["image_sizes"][number]
        row = [self.image_token] * (width // side) + [self.image_break_token]
        return "".join((row * (height // side))[:-1] + [self.image_end_token])

    def apply_chat_template(self, turns, add_generation_prompt):
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def save_pretrained(self, directory):
        self.image_processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def processor_of(config, **settings) -> TheirProcessor:
    """Their processor; `settings` are of the image processor."""
    tokenizer = tiny.tokenizer(
        config, TEMPLATE, names=NAMES, bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    how = {"size": {"longest_edge": LONGEST}, "patch_size": config.patch_side} | settings
    images = hf.transformers.PixtralImageProcessorPil(**how)
    return TheirProcessor(images, tokenizer, config)


def processor(config) -> Mistral3Processor:
    """Our processor of a config."""
    theirs = processor_of(config)
    return Mistral3Processor(theirs.tokenizer, lambda: theirs.image_processor, config)


def inputs(batch: Batch, pictures: list[list[PIL.Image.Image]]) -> dict[str, np.ndarray]:
    """A batch of ours as their network wants it: pictures padded to one size."""
    del pictures
    found = {
        "input_ids": batch.ids.astype(int),
        "attention_mask": batch.valid.astype(int),
        "position_ids": batch.position.astype(int),
    }
    real = np.flatnonzero(batch.is_real_tile)
    if len(real):
        each = [batch.processor._tile_pixels(batch, tile).transpose(2, 0, 1) for tile in real]
        sizes = np.array([x.shape[1:] for x in each])
        pixels = np.zeros((len(each), 3, *sizes.max(0)), np.float32)
        for padded, picture in zip(pixels, each, strict=True):
            padded[:, : picture.shape[1], : picture.shape[2]] = picture
        found |= {"pixel_values": pixels, "image_sizes": sizes}
    return found


def placed(want: dict[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    """Tensors of their tower, which has all patches in one row, at the places of the batch."""
    config = batch.processor.config
    merge, count = config.merge, batch.pixels.shape[1]
    at, squares = [], []  # our place of each of their patches, and of their tokens
    for tile in np.flatnonzero(batch.is_real_tile):
        rows, columns = batch.grid[tile]
        row, column = np.divmod(np.arange(rows * columns), columns)
        block = row // merge * (columns // merge) + column // merge
        at += list(tile * count + block * merge**2 + row % merge * merge + column % merge)
        squares += list(tile * (count // merge**2) + np.arange(rows * columns // merge**2))

    def one(name: str, array: np.ndarray) -> np.ndarray:
        if name.startswith(("lm.", "logits")):
            return array
        places, own = (at, count) if name.startswith("vision.") else (squares, count // merge**2)
        axis = int(hf.sites.get(name).stacked)
        if array.shape[axis] == 1:  # all pictures are one row of theirs
            array = array.squeeze(axis)
        lead, tail = array.shape[:axis], array.shape[axis + 1 :]
        out = np.zeros((*lead, len(batch.grid) * own, *tail), array.dtype)
        out[(slice(None),) * axis + (places,)] = array
        return out.reshape(*lead, len(batch.grid), own, *tail)

    return {name: one(name, array) for name, array in want.items()}
