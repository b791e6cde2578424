"""Tiny random checkpoints in the form of released ones, made and saved by transformers."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image

from mllm_jax import families, tokens
from mllm_jax.batch import Batch
from mllm_jax.families.gemma3 import model as gemma3
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from tests.helpers import hf, tiny

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

# Of Gemma 3.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% if messages[0]['content'] is string %}"
    "{% set first_user_prefix = messages[0]['content'] + '\n\n' %}{% else %}"
    "{% set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first_user_prefix = '' %}"
    "{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}"
    "{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A checkpoint.

    Attributes:
      config: ours. network, processor: theirs, in float32. directory: where both were saved.
      image: what their processor reads for a picture.
      where: sites that are elsewhere than the site table says.
      trims: whether the chat template trims texts.
    """

    config: llava.LlavaConfig
    network: Any
    processor: Any
    directory: pathlib.Path
    image: str = "<image>"
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trims: bool = False


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


def gemma_3(directory: pathlib.Path) -> Family:
    config = gemma3.Gemma3Config.tiny()
    network = hf.transformers.Gemma3ForConditionalGeneration(hf.gemma3_config(config))
    return _keep(
        config,
        hf.random_gemma(network),
        hf.transformers.Gemma3Processor(
            hf.transformers.Gemma3ImageProcessorPil(size=_square(config)),
            tiny.gemma3_tokenizer(config),
            chat_template=GEMMA,
            image_seq_length=config.image_tokens,
        ),
        directory,
        image="<start_of_image>",
        where=hf.POST_NORMS,
        trims=True,
    )


def gemma_3_text(directory: pathlib.Path) -> Family:
    """A language model without pictures; its processor is its tokenizer."""
    config = families.FAMILIES["gemma3_text"].config.tiny()
    network = hf.transformers.Gemma3ForCausalLM(hf.gemma3_text_config(config.lm))
    tokenizer = tiny.gemma3_tokenizer(config, GEMMA)
    where = hf.POST_NORMS | {"lm.embed": "language_model.model.embed_tokens (output)"}
    return _keep(config, hf.random_gemma(network), tokenizer, directory, where=where)


ALL = {
    "llava": llava_1_5,
    "next-vicuna": next_vicuna,
    "next-mistral": next_mistral,
    "gemma3": gemma_3,
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


def _square(config) -> dict[str, int]:
    return dict.fromkeys(("height", "width"), config.vision.image_size)


def _keep(config, network, processor, directory, **how) -> Family:
    network.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Family(config, network, processor, directory, **how)


def inputs(batch: Batch, pictures: list[list[PIL.Image.Image]]) -> dict[str, np.ndarray]:
    """A batch of ours as the network of transformers wants it; tiles that fill it are left out."""
    found = {
        "input_ids": batch.ids.astype(int),
        "attention_mask": batch.valid.astype(int),
        "position_ids": batch.position.astype(int),
    }
    if batch.is_real_tile.any():
        found["pixel_values"] = batch.pixels[batch.is_real_tile].transpose(0, 3, 1, 2)
    if batch.processor.config.attends_forward == "picture":
        found["token_type_ids"] = (batch.tokens.kind == tokens.CODE["image"]).astype(int)
    if batch.processor.config.pinpoints:
        found["image_sizes"] = np.array([p.size[::-1] for row in pictures for p in row])
    return found


def placed(want: dict[str, np.ndarray], real: np.ndarray) -> dict[str, np.ndarray]:
    """Tensors of real tiles at their places among all tiles of the batch, the others zero."""

    def one(name: str, array: np.ndarray) -> np.ndarray:
        if name.startswith(("lm.", "logits")):
            return array
        axis = hf.sites.get(name).stacked
        out = np.zeros((*array.shape[:axis], len(real), *array.shape[axis + 1 :]), array.dtype)
        out[(slice(None),) * axis + (real,)] = array
        return out

    return {name: one(name, array) for name, array in want.items()}
