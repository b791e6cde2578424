"""Tiny random checkpoints of InternVL, made and saved by transformers."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib

from mllm_jax import families
from mllm_jax.checkpoints.networks import internvit
from mllm_jax.families.internvl.model import InternVlConfig
from mllm_jax.families.internvl.processor import InternVlProcessor
from tests.helpers import hf, tiny
from tests.helpers.family import Family

# What the hub has, without video.
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
WRITTEN = "<IMG_CONTEXT>"
NAMES = ("<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", WRITTEN)
# Nothing in transformers is what our tower adds to the residual: it scales it outside of modules.
UNTOLD = frozenset({"vision.attn_out", "vision.mlp.out"})


def checkpoint(directory: pathlib.Path) -> Family:
    """As InternVL 3: Qwen2, and a tower with biases."""
    return _saved(InternVlConfig.tiny(), directory, seed=1)


def checkpoint_3_5(directory: pathlib.Path) -> Family:
    """As InternVL 3.5 with the larger tower: Qwen3; RMS norms, norms of queries and keys."""
    config = InternVlConfig.tiny()
    lm = dataclasses.replace(config.lm, biases="", qk_norm=True, tied=True, rope_theta=1e6)
    vision = dataclasses.replace(config.vision, norm="rms", qkv_bias=False, qk_norm=True)
    return _saved(dataclasses.replace(config, lm=lm, vision=vision), directory)


def _saved(config: InternVlConfig, directory: pathlib.Path, seed: int = 0) -> Family:
    network = hf.random(network_of(config), seed)
    if config.lm.tied:  # else each token predicts itself
        with hf.torch.no_grad():
            network.get_input_embeddings().weight.mul_(0.2)
    processor = TheirProcessor(config)
    network.save_pretrained(directory)
    processor.save_pretrained(directory)
    where = {name: f"vision_model.{place}" for name, place in internvit.SITES.items()}
    return Family(
        config, network, processor, directory, written=WRITTEN, begins="<|im_start|>",
        where=where, untold=UNTOLD, is_automatic=False,
    )  # fmt: skip


def network_of(config: InternVlConfig) -> hf.torch.nn.Module:
    """Their network of one of our configs."""
    fields = families.of(config).to_hf(config)
    del fields["model_type"], fields["architectures"]
    settings = hf.transformers.InternVLConfig(**fields, **hf.ATTENTION)
    return hf.transformers.InternVLForConditionalGeneration(settings)


def processor(config: InternVlConfig) -> InternVlProcessor:
    """Ours, of the parts of theirs."""
    theirs = TheirProcessor(config)
    return InternVlProcessor(theirs.tokenizer, lambda: theirs.image_processor, config)


class TheirProcessor:
    """Their processor without video: theirs cannot be made without torchvision."""

    def __init__(self, config: InternVlConfig):
        module = importlib.import_module("transformers.models.internvl.processing_internvl")
        self.kind = module.InternVLProcessor
        self.image_processor = hf.transformers.GotOcr2ImageProcessorPil(
            size=dict.fromkeys(("height", "width"), config.vision.image_size),
            min_patches=config.min_tiles, max_patches=config.max_tiles, crop_to_patches=False,
        )  # fmt: skip
        self.tokenizer = tiny.tokenizer(
            config, TEMPLATE, begin=False, names=NAMES, eos_token="<|im_end|>"
        )
        self.image_token, self.start_image_token, self.end_image_token = WRITTEN, "<img>", "</img>"
        self.image_seq_length = config.image_tokens

    def __call__(self, images, text, return_tensors="np"):
        made, parts = {}, text.split(self.image_token)
        if images:
            made = dict(
                self.image_processor(images, return_tensors="np", **self.kind.images_kwargs)
            )
        assert len(parts) - 1 == len(images or ())
        replaced = [
            self.kind.replace_image_token(self, made, number) for number in range(len(parts) - 1)
        ]
        whole = "".join(a + b for a, b in zip(parts, [*replaced, ""], strict=True))
        return {**self.tokenizer([whole], return_tensors=return_tensors), **made}

    def apply_chat_template(self, turns, add_generation_prompt):
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def save_pretrained(self, directory):
        self.image_processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
