"""No array of a pass holds the attention pattern of more than one layer, unless it is kept."""

from __future__ import annotations

import dataclasses

import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import binding
from mllm_jax.passes.run import compiled_run
from tests.helpers import random_inputs


def lowered(model, batch, captures):
    plain = batch.replace(processor=None)
    bound = binding.bind(model, plain, None, captures)
    return compiled_run.lower(model, plain, *bound, logits="none", remat=False)


def test_no_pattern_of_all_layers_exists_at_one_time(tiny_model, make_batch):
    """Only one layer's pattern is there at a time, in the program and in its memory."""
    batch = make_batch(images=(1, 2), words=(5, 8))
    L, (B, T) = tiny_model.config.lm.layers, batch.ids.shape
    N = tiny_model.config.lm.heads
    whole = f"{L}x{B}x{N}x{T}x{T}xf32"
    programs = {
        name: lowered(tiny_model, batch, {"x": capture})
        for name, capture in {
            "keep": mj.keep(S.lm.attn.pattern),
            "attention": mj.attention(S.lm.attn.pattern),
            "map": mj.attention_map(S.lm.attn.pattern),
            "rollout": mj.rollout(S.lm.attn.pattern),
            "mass": mj.mass(S.lm.attn.pattern, by=tok.kind),
        }.items()
    }
    assert {name: whole in p.as_text() for name, p in programs.items()} == {
        name: name == "keep" for name in programs
    }


@pytest.mark.slow
def test_the_memory_of_a_map_is_that_of_one_pattern(random_model, make_batch):
    """The compiled program says so: with more layers, only the result grows."""
    bytes_of = {}
    for layers in (2, 12):
        lm = dataclasses.replace(random_inputs.TINY.lm, layers=layers)
        model = random_model(dataclasses.replace(random_inputs.TINY, lm=lm))
        batch = make_batch(model.config, images=(1, 1), words=(200, 180))
        for name in ("attention_map", "rollout", "keep"):
            capture = getattr(mj, name)(S.lm.attn.pattern)
            memory = lowered(model, batch, {"x": capture}).compile().memory_analysis()
            bytes_of[name, layers] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    (B, T), N = batch.ids.shape, model.config.lm.heads
    one = 4 * B * N * T * T
    assert bytes_of["keep", 12] - bytes_of["keep", 2] > 9 * one
    for name, heads in (("attention_map", N), ("rollout", 1)):
        grown = bytes_of[name, 12] - bytes_of[name, 2]
        assert grown < 10 * 4 * B * heads * T * 1.5 + one / 2, (name, grown, one)
