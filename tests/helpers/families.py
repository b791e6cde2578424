"""Tiny random checkpoints in the form of released ones, made and saved by transformers."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np

from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.families.llava_onevision import model as llava_onevision
from mllm_jax.models import rotary, siglip
from tests.helpers import family, gemma, hf, idefics3, internvl, paligemma, pixtral, qwen, tiny
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
# Of LLaVA-Interleave and LLaVA-OneVision.
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llava_1_5(directory: pathlib.Path) -> Family:
    config = llava.LlavaConfig.of(
        llava.ClipConfig.tiny(), llava.DecoderConfig.tiny(), image_token=95
    )
    network = hf.transformers.LlavaForConditionalGeneration(hf.llava_config(config))
    images = hf.transformers.CLIPImageProcessorPil
    return _save(config, network, hf.transformers.LlavaProcessor, images, VICUNA, directory)


def siglip_qwen2(directory: pathlib.Path) -> Family:
    """As LLaVA-Interleave: the last layer of SigLIP, and Qwen2 with biases and a tied head."""
    lm = dataclasses.replace(
        llava.DecoderConfig.tiny(), biases="qkv", tied=True, rope_theta=1e6, eps=1e-6
    )
    text = hf.llama_config(lm, hf.transformers.Qwen2Config)
    return _siglip(lm, text, -1, CHATML, directory)


def siglip_gemma(directory: pathlib.Path) -> Family:
    lm = dataclasses.replace(
        llava.DecoderConfig.tiny(), unit_offset=True, act="gelu_tanh", embedding_scale=32**0.5,
        tied=True,
    )  # fmt: skip
    return _siglip(lm, hf.llama_config(lm, hf.transformers.GemmaConfig), -2, VICUNA, directory)


def clip_llama3(directory: pathlib.Path) -> Family:
    """As LLaVA-Llama-3: scaled rotary angles."""
    scaling = rotary.RopeScaling(kind="llama3", factor=8.0, original_length=32)
    lm = dataclasses.replace(llava.DecoderConfig.tiny(), rope_theta=500.0, rope_scaling=scaling)
    text = hf.llama_config(lm)
    text.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = llava.LlavaConfig.of(llava.ClipConfig.tiny(), lm, image_token=95)
    network = hf.transformers.LlavaForConditionalGeneration(hf.llava_config(config, text))
    images = hf.transformers.CLIPImageProcessorPil
    return _save(config, network, hf.transformers.LlavaProcessor, images, VICUNA, directory)


def _siglip(lm, text, layer: int, template: str, directory: pathlib.Path) -> Family:
    vision = dataclasses.replace(siglip.SiglipConfig.tiny(), feature_layer=layer)
    config = llava.LlavaConfig.of(vision, lm, image_token=95)
    network = hf.transformers.LlavaForConditionalGeneration(hf.llava_config(config, text))
    images = hf.transformers.SiglipImageProcessorPil
    return _save(config, network, hf.transformers.LlavaProcessor, images, template, directory)


class OneVisionProcessor(hf.transformers.LlavaOnevisionProcessor):
    """Theirs without its processor of videos, which needs torchvision."""

    # The tiny tokenizer has no such token.
    video_token_id = property(lambda self: None, lambda self, value: None)

    def check_argument_for_proper_class(self, *args):
        return None

    def __call__(self, images=None, **inputs):
        return super().__call__(images=[images] if images else None, **inputs)  # of one row

    def save_pretrained(self, directory):
        self.image_processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(self.chat_template)


def onevision(directory: pathlib.Path) -> Family:
    config = llava_onevision.LlavaOneVisionConfig.tiny()
    text = hf.llama_config(config.lm, hf.transformers.Qwen2Config)
    network = hf.transformers.LlavaOnevisionForConditionalGeneration(hf.llava_config(config, text))
    images = hf.transformers.LlavaOnevisionImageProcessorPil
    return _save(config, network, OneVisionProcessor, images, CHATML, directory)


def next_vicuna(directory: pathlib.Path) -> Family:
    return _next(llava_next.LlavaNextConfig.tiny(), None, VICUNA, directory)


def next_mistral(directory: pathlib.Path) -> Family:
    lm = dataclasses.replace(llava.DecoderConfig.tiny(), kv_heads=1, rope_theta=1e6)
    config = dataclasses.replace(llava_next.LlavaNextConfig.tiny(), lm=lm)
    text = hf.llama_config(lm, hf.transformers.MistralConfig, sliding_window=None)
    return _next(config, text, MISTRAL, directory)


ALL = {
    "paligemma2": functools.partial(paligemma.checkpoint, 2),
    "llava": llava_1_5,
    "next-vicuna": next_vicuna,
    "next-mistral": next_mistral,
    "siglip-qwen2": siglip_qwen2,
    "onevision": onevision,
    "qwen2.5-vl": functools.partial(qwen.checkpoint, "2.5"),
    "qwen2-vl": functools.partial(qwen.checkpoint, "2", seed=6, kv_heads=4),
    "qwen3-vl": functools.partial(qwen.checkpoint, "3"),
    "gemma3": gemma.checkpoint,
    "internvl3": internvl.checkpoint,
    "idefics3": functools.partial(idefics3.checkpoint, "idefics3", kv_heads=1),
    "mistral3": functools.partial(pixtral.checkpoint, "mistral3", kv_heads=1, rope_theta=1e6),
}
VARIANTS = {  # of slow tests
    "siglip-gemma": siglip_gemma,
    "clip-llama3": clip_llama3,
    "internvl3.5": internvl.checkpoint_3_5,
    "paligemma": functools.partial(paligemma.checkpoint, 1),
    "paligemma2-untied": functools.partial(paligemma.checkpoint, 2, tied=False),
    "pixtral": functools.partial(pixtral.checkpoint, "llava_pixtral"),
    "mistral3-tied": functools.partial(pixtral.checkpoint, "mistral3", tied=True),
    "smolvlm": functools.partial(idefics3.checkpoint, "smolvlm", tied=True),
}


def _next(config, text, template: str, directory: pathlib.Path) -> Family:
    network = hf.transformers.LlavaNextForConditionalGeneration(hf.llava_config(config, text))
    images = hf.transformers.LlavaNextImageProcessorPil
    return _save(config, network, hf.transformers.LlavaNextProcessor, images, template, directory)


def _save(config, network, kind, images, template, directory) -> Family:
    side = config.vision.image_size
    cuts = {"image_grid_pinpoints": [list(p) for p in config.pinpoints]} if config.pinpoints else {}
    square = {"height": side, "width": side}
    has_cls = config.vision.has_cls
    sizes = {"size": {"shortest_edge": side}, "crop_size": square} if has_cls else {"size": square}
    if kind is OneVisionProcessor:
        how = {"num_image_tokens": config.image_tokens, "video_processor": None}
        how["vision_aspect_ratio"] = f"anyres_max_{config.max_tiles}"
    else:  # the CLS token is taken away again
        how = {"patch_size": config.vision.patch, "num_additional_image_tokens": int(has_cls)}
    processor = kind(
        image_processor=images(**sizes, **cuts),
        tokenizer=tiny.tokenizer(config, None, bos_token="<s>"),
        **how,
        vision_feature_select_strategy="default" if has_cls else "full",
        chat_template=template,
    )
    hf.random(network)
    text, offset = network.model.language_model, int(config.lm.unit_offset)
    with hf.torch.no_grad():
        for name, weight in text.named_parameters():
            weight.sub_(offset * ("norm" in name))  # factors are 1 + weight, of order 1
        if config.lm.tied:  # a factor below zero; else each token predicts itself
            text.norm.weight.neg_().sub_(2 * offset)
    network.save_pretrained(directory)
    processor.save_pretrained(directory)
    if kind is not OneVisionProcessor:
        return Family(config, network, processor, directory)
    return Family(
        config, network, processor, directory, is_automatic=False, inputs=_onevision_inputs
    )


def _onevision_inputs(batch, pictures) -> dict[str, np.ndarray]:
    """Theirs, with the number of pictures of each row, which decides whether they are cut."""
    counts = {"batch_num_images": np.array([len(row) for row in pictures if row])}
    return family.inputs(batch, pictures) | counts
