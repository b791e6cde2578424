"""Tiny random checkpoints of PaliGemma 1 and 2, made and saved by transformers."""

from __future__ import annotations

import dataclasses
import pathlib

from mllm_jax.families.paligemma.model import PaliGemmaConfig, gemma
from tests.helpers import gemma as gemmas
from tests.helpers import hf, tiny
from tests.helpers.family import Family


def checkpoint(version: int, directory: pathlib.Path, **changes) -> Family:
    """A checkpoint of a version; `changes` are to its language model."""
    # Their processor adds tokens after all others, so the image token follows the words.
    words = {*tiny.SPECIAL[:-1], "\n", *tiny.TEXT.split()}
    config = dataclasses.replace(PaliGemmaConfig.tiny(), image_token=len(words))
    if version == 1:
        lm = gemma(
            vocab=96, width=32, layers=4, heads=4, kv_heads=1, head_width=8, mlp=48
        )  # fmt: skip
        config = dataclasses.replace(config, lm=lm)
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, **changes))
    network = hf.transformers.PaliGemmaForConditionalGeneration(hf_config(config))
    gemmas.random(network)
    if version == 1:  # a factor below zero; else each token predicts itself
        with hf.torch.no_grad():
            network.model.language_model.norm.weight.neg_().sub_(2)
    network.save_pretrained(directory)
    processor = processor_of(config)
    processor.save_pretrained(directory)
    where = hf.POST_NORMS if version == 2 else {}
    return Family(config, network, processor, directory, where=where)


def hf_config(config: PaliGemmaConfig) -> hf.transformers.PaliGemmaConfig:
    lm, more, kind = config.lm, {}, hf.transformers.GemmaConfig
    if lm.post_norms:
        kind = hf.transformers.Gemma2Config
        more = {
            "sliding_window": max(lm.windows),
            "query_pre_attn_scalar": round(lm.query_scale**-2),
            "attn_logit_softcapping": lm.attention_softcap,
            "final_logit_softcapping": lm.logit_softcap,
        }
    return hf.transformers.PaliGemmaConfig(
        vision_config=hf.siglip_config(config.vision),
        text_config=hf.llama_config(lm, kind, **more),
        image_token_index=config.image_token,
        projection_dim=lm.width,
        hidden_size=lm.width,
        tie_word_embeddings=lm.tied,
        **hf.ATTENTION,
    )


def processor_of(config: PaliGemmaConfig) -> hf.transformers.PaliGemmaProcessor:
    side = dict.fromkeys(("height", "width"), config.vision.image_size)
    images = hf.transformers.SiglipImageProcessorPil(
        size=side, image_seq_length=config.image_tokens
    )
    tokenizer = tiny.tokenizer(config, None, begin=False, bos_token="<s>")
    return hf.transformers.PaliGemmaProcessor(images, tokenizer)
