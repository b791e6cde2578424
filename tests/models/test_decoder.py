"""The Llama decoder is HF's, at every site."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from mllm_jax.families.llava import model as llava
from mllm_jax.models import rotary
from tests.helpers import hf

SITES = (
    "lm.resid_pre", "lm.attn.pattern", "lm.attn.heads", "lm.attn_out", "lm.resid_mid",
    "lm.mlp.input", "lm.mlp.gate", "lm.mlp.act", "lm.mlp.gated", "lm.mlp.out", "lm.resid_post",
    "lm.norm", "logits",
)  # fmt: skip

CONFIGS = {
    "mha": {"kv_heads": 4},
    "gqa": {"kv_heads": 2, "rope_theta": 100.0},
    "mqa": {"kv_heads": 1, "rope_theta": 500000.0},
    "tied": {"tied": True},
    "narrow heads": {"head_width": 6},
    "wide heads": {"head_width": 20, "eps": 1e-3},
}
PADDED = {"none": (12, 12, 12), "right": (12, 5, 9), "left": (12, 5, 9)}


@functools.cache
def pair(name: str) -> tuple[hf.transformers.LlamaForCausalLM, llava.Llava]:
    config = llava.LlavaConfig.tiny()
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, **CONFIGS[name]))
    theirs = hf.random(hf.transformers.LlamaForCausalLM(hf.llama_config(config.lm)))
    return theirs, hf.transfer(config, theirs)


@pytest.mark.parametrize("pad", PADDED)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_site(name, pad, make_batch):
    theirs, ours = pair(name)
    words = PADDED[pad]
    batch = make_batch(ours.config, images=(0, 0, 0), words=words, pad=pad, seed=1)
    want = hf.tensors(
        theirs,
        SITES,
        input_ids=batch.ids.astype(int),
        attention_mask=batch.valid.astype(int),
        position_ids=batch.position.astype(int),
    )
    assert len(want["lm.resid_post"]) == ours.config.lm.layers
    hf.assert_equal(ours, batch, want)


def test_what_padding_holds_changes_nothing(make_batch):
    _, ours = pair("gqa")
    batch = make_batch(ours.config, images=(0, 0), words=(12, 5), pad="left")
    garbled = batch.replace(ids=np.where(batch.valid, batch.ids, 7))
    x = [hf.run.run(ours, b, logits="all").logits for b in (batch, garbled)]
    np.testing.assert_array_equal(*(np.asarray(a)[batch.valid] for a in x))


@pytest.mark.parametrize("theta", [100.0, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("width", [6, 64, 128])
def test_rotary_angles_far_along_the_row(width, theta):
    config = llava.DecoderConfig(head_width=width, rope_theta=theta)
    position = np.arange(0, 8192, 7)[None]
    theirs = hf.modeling_llama.LlamaRotaryEmbedding(hf.llama_config(config))
    want = theirs(hf.torch.zeros(1), hf.torch.from_numpy(position))
    got = rotary.rotation(position, rotary.frequencies(width, theta))
    for ours, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(ours[:, :, 0], reference.numpy(), rtol=0, atol=1e-6)


def test_ids_outside_the_vocabulary_are_read_as_id_0(tiny_model):
    ids = np.array([[0, -1, -200, 96, 10**6, 3]], np.int32)
    got = np.asarray(tiny_model.lm.embeddings(ids))[0]
    np.testing.assert_array_equal(got, tiny_model.lm.embed[...][np.array([0, 0, 0, 0, 0, 3])])
