"""Tiny random checkpoints in the form of released ones, made and saved by transformers."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from tests.helpers import hf, qwen, tiny
from tests.helpers.family import Family

# What the hub has: of LLaVA-1.5 and LLaVA-NeXT on Vicuna, and of LLaVA-NeXT on Mistral.
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% endfor %}"
)


def llava_1_5(directory: pathlib.Path) -> Family:
    config = llava.LlavaConfig.of(
        llava.ClipConfig.tiny(), llava.DecoderConfig.tiny(), image_token=95
    )
    network = hf.transformers.LlavaForConditionalGeneration(hf.llava_config(config))
    images = hf.transformers.CLIPImageProcessorPil
    return _save(config, network, hf.transformers.LlavaProcessor, images, VICUNA, directory)


def next_vicuna(directory: pathlib.Path) -> Family:
    return _next(llava_next.LlavaNextConfig.tiny(), None, VICUNA, directory)


def next_mistral(directory: pathlib.Path) -> Family:
    lm = dataclasses.replace(llava.DecoderConfig.tiny(), kv_heads=1, rope_theta=1e6)
    config = dataclasses.replace(llava_next.LlavaNextConfig.tiny(), lm=lm)
    text = hf.llama_config(lm, hf.transformers.MistralConfig, sliding_window=None)
    return _next(config, text, MISTRAL, directory)


ALL = {
    "llava": llava_1_5,
    "next-vicuna": next_vicuna,
    "next-mistral": next_mistral,
    "qwen2.5-vl": functools.partial(qwen.checkpoint, "2.5"),
    "qwen2-vl": functools.partial(qwen.checkpoint, "2", tied=True, kv_heads=4),
    "qwen3-vl": functools.partial(qwen.checkpoint, "3"),
}


def _next(config, text, template: str, directory: pathlib.Path) -> Family:
    network = hf.transformers.LlavaNextForConditionalGeneration(hf.llava_config(config, text))
    images = hf.transformers.LlavaNextImageProcessorPil
    return _save(config, network, hf.transformers.LlavaNextProcessor, images, template, directory)


def _save(config, network, kind, images, template, directory) -> Family:
    side = config.vision.image_size
    cuts = {"image_grid_pinpoints": [list(p) for p in config.pinpoints]} if config.pinpoints else {}
    processor = kind(
        image_processor=images(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **cuts
        ),
        tokenizer=tiny.tokenizer(config, None, bos_token="<s>"),
        patch_size=config.vision.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which is then taken away again
        chat_template=template,
    )
    hf.random(network).save_pretrained(directory)
    processor.save_pretrained(directory)
    return Family(config, network, processor, directory)
