"""Tiny random checkpoints of Gemma 3, made and saved by transformers."""

from __future__ import annotations

import functools
import pathlib

from mllm_jax import families
from mllm_jax.families.gemma3.model import Gemma3Config
from mllm_jax.families.gemma3.processor import Gemma3Processor
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.text_only import TextConfig
from mllm_jax.processors.text_only import TextProcessor
from tests.helpers import hf, tiny
from tests.helpers.family import Family

# What the hub has.
TEMPLATE = (
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
TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def checkpoint(directory: pathlib.Path) -> Family:
    """A checkpoint that reads pictures."""
    config = Gemma3Config.tiny()
    side = dict.fromkeys(("height", "width"), config.vision.image_size)
    processor = hf.transformers.Gemma3Processor(
        hf.transformers.Gemma3ImageProcessorPil(size=side),
        tokenizer(config, None),
        chat_template=TEMPLATE,
        image_seq_length=config.image_tokens,
    )
    network = random(hf.transformers.Gemma3ForConditionalGeneration(hf_config(config)))
    return _keep(
        Family(
            config, network, processor, directory, written=TOKENS["boi_token"],
            where=hf.POST_NORMS, trims=True,
        )
    )  # fmt: skip


def processor(config: Gemma3Config) -> Gemma3Processor:
    """Ours, of the parts of theirs."""
    side = dict.fromkeys(("height", "width"), config.vision.image_size)
    pictures = functools.partial(hf.transformers.Gemma3ImageProcessorPil, size=side)
    return Gemma3Processor(tokenizer(config, TEMPLATE), pictures, config)


def text_processor(config: TextConfig) -> TextProcessor:
    """Ours of a language model alone."""
    return families.of(config).processor(tokenizer(config, TEMPLATE), lambda: None, config)


def text_checkpoint(directory: pathlib.Path) -> Family:
    """A checkpoint of a language model alone; its processor is its tokenizer."""
    config = families.FAMILIES["gemma3_text"].config.tiny()
    network = random(hf.transformers.Gemma3ForCausalLM(text_config(config.lm)))
    where = hf.POST_NORMS | {"lm.embed": "language_model.model.embed_tokens (output)"}
    return _keep(Family(config, network, tokenizer(config, TEMPLATE), directory, where=where))


def _keep(family: Family) -> Family:
    family.network.save_pretrained(family.directory)
    family.processor.save_pretrained(family.directory)
    return family


def tokenizer(config, template: str | None):
    """Line ends merge, also those around pictures with those of the text."""
    names = (
        *tiny.SPECIAL[:-1], "<start_of_turn>", "<end_of_turn>", TOKENS["boi_token"],
        TOKENS["eoi_token"], TOKENS["image_token"],
    )  # fmt: skip
    return tiny.tokenizer(
        config, template, names=names, lines=("\n", "\n\n", "\n\n\n"), bos_token="<s>",
        extra_special_tokens=TOKENS,
    )  # fmt: skip


def random(network: hf.torch.nn.Module) -> hf.torch.nn.Module:
    """A Gemma with random weights; the factor of its RMS norms is 1 + weight."""
    with hf.torch.no_grad():
        for name, weight in hf.random(network).named_parameters():
            if "norm" in name and "vision_tower" not in name:
                weight.sub_(1)
            elif "embed_tokens" in name:
                weight.mul_(0.2)  # else each token predicts itself
    return network


def text_config(config: DecoderConfig) -> hf.transformers.Gemma3TextConfig:
    scaling = config.rope_scaling
    scaled = {"rope_type": "linear", "factor": scaling.factor} if scaling else {}
    return hf.transformers.Gemma3TextConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        intermediate_size=config.mlp,
        rms_norm_eps=config.eps,
        sliding_window=max(config.windows),
        layer_types=[("full_attention", "sliding_attention")[bool(n)] for n in config.windows],
        query_pre_attn_scalar=round((config.query_scale or config.head_width**-0.5) ** -2),
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta} | scaled,
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_theta},
        },
        tie_word_embeddings=config.tied,
        pad_token_id=None,
        **hf.ATTENTION,
    )


def hf_config(config: Gemma3Config) -> hf.transformers.Gemma3Config:
    return hf.transformers.Gemma3Config(
        vision_config=hf.siglip_config(config.vision),
        text_config=text_config(config.lm),
        mm_tokens_per_image=config.image_tokens,
        image_token_index=config.image_token,
        tie_word_embeddings=config.lm.tied,
        **hf.ATTENTION,
    )
