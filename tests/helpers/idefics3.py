"""Tiny random checkpoints of Idefics3 and SmolVLM, made and saved by transformers."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import PIL.Image

from mllm_jax import families, sites
from mllm_jax.batch import Batch
from mllm_jax.checkpoints.networks import siglip
from mllm_jax.families.idefics3.processor import Idefics3Processor
from tests.helpers import family, hf, tiny
from tests.helpers.family import Family

# What the hub has.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
NAMES = (
    "<unk>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>",
    *PLACES, "<image>",
)  # fmt: skip
CLASS = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}


def checkpoint(kind: str, directory: pathlib.Path, **changes) -> Family:
    """A checkpoint of a model type; `changes` are to its language model."""
    config = families.FAMILIES[kind].config.tiny()
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, **changes))
    network = network_of(config)
    hf.random(network)
    if config.lm.tied:
        network.tie_weights()
        with hf.torch.no_grad():  # a factor below zero; else each token predicts itself
            network.model.text_model.norm.weight.neg_()
    network.save_pretrained(directory)
    processor = processor_of(config)
    processor.save_pretrained(directory)
    return Family(
        config, network, processor, directory, begins="<|im_start|>", where=where(),
        is_automatic=kind == "idefics3", inputs=inputs,
    )  # fmt: skip


def network_of(config) -> hf.torch.nn.Module:
    """Their network of one of our configs."""
    fields = families.of(config).to_hf(config)
    kind, made = fields.pop("model_type"), fields.pop("architectures")
    assert made == [f"{CLASS[kind]}ForConditionalGeneration"]
    fields["text_config"] |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = getattr(hf.transformers, f"{CLASS[kind]}Config")(**fields, **hf.ATTENTION)
    return getattr(hf.transformers, made[0])(settings)


def where() -> dict[str, str]:
    """Our sites among their modules."""
    places = {name: f"model.vision_model.{place}" for name, place in siglip.SITES.items()}
    places["projector.out"] = "model.connector (output)"
    text = {
        site.name: site.hf.replace("language_model.model", "model.text_model")
        for site in sites.TABLE
        if site.name.startswith("lm.")
    }
    return places | text


def processor_of(config, **settings) -> hf.transformers.Idefics3Processor:
    """Their processor; SmolVLM's cannot be made without torchvision, and is the same on pictures.

    Args:
      settings: Of the image processor.
    """
    side = config.vision.image_size
    how = {
        "size": {"longest_edge": 3 * side},
        "max_image_size": {"longest_edge": side},
    } | settings
    images = getattr(hf.transformers, f"{CLASS[config.model_type]}ImageProcessorPil")(**how)
    tokenizer = tiny.tokenizer(
        config, None, begin=False, names=NAMES, words="User Assistant",
        bos_token="<|im_start|>", eos_token="<end_of_utterance>",
    )  # fmt: skip
    return hf.transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=config.image_tokens, chat_template=TEMPLATE
    )


def processor(config) -> Idefics3Processor:
    """Our processor of a config."""
    theirs = processor_of(config)
    return Idefics3Processor(theirs.tokenizer, lambda: theirs.image_processor, config)


def inputs(batch: Batch, pictures: list[list[PIL.Image.Image]]) -> dict[str, np.ndarray]:
    """A batch of ours as their network wants it: all tiles in one row."""
    found = family.inputs(batch, pictures)
    if "pixel_values" in found:
        found["pixel_values"] = found["pixel_values"][None]
    return found
