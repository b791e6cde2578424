"""Direct logit attributions against the model's own logits and loops of NumPy, for every family."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.analysis import direct_logits
from tests.helpers import random_inputs, tiny, tiny_families

QUESTIONS = ["what is shown in the picture ?", "which one is small ?"]
QUICK = ("paligemma",)  # norms after attention, and a soft cap
SLOW = ("qwen3_vl", "gemma3")


def marks(name):
    return (
        [] if name in QUICK else [pytest.mark.slow, *([] if name in SLOW else [pytest.mark.long])]
    )


def uncapped(model, logits):
    cap = model.config.lm.logit_softcap
    return logits if cap is None else cap * np.arctanh(np.asarray(logits, np.float64) / cap)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name)) for name in tiny_families.CONFIGS]
)
def test_the_parts_sum_to_the_difference_of_logits(name):
    model = random_inputs.random_model(tiny_families.CONFIGS[name])
    shown = None if name == "gemma3_text" else [tiny.picture(i) for i in range(2)]
    batch = tiny_families.processor(name)(shown, QUESTIONS)
    right, wrong = np.array([3, 20]), 7
    found = direct_logits.attribute(model, batch, right, wrong)
    logits = uncapped(model, mj.run(model, batch).logits)
    want = logits[[0, 1], right] - logits[:, wrong]
    assert np.abs(want).min() > 1e-2
    np.testing.assert_allclose(found.total, want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.logits, want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.by_token.sum(-1), found.heads, rtol=0, atol=1e-4)
    if model.config.lm.biases != "qkvo":
        np.testing.assert_allclose(found.heads.sum(-1), found.attention, rtol=0, atol=1e-4)
    alone = direct_logits.attribute(model, batch, right)
    np.testing.assert_allclose(alone.total, logits[[0, 1], right], rtol=0, atol=1e-4)


def test_heads_and_tokens_are_those_of_loops(tiny_model, make_batch):
    batch = make_batch(images=(1, 0), words=(7, 9), pad="left")
    edits = mj.scale(S.lm.attn.heads[2, [1]], -0.5) >> mj.ablate(S.lm.mlp.out[1])
    found = direct_logits.attribute(tiny_model, batch, 5, edits=edits)
    asked = {"z": mj.keep(S.lm.attn.heads), "v": mj.keep(S.lm.attn.v),
             "p": mj.keep(S.lm.attn.pattern), "x": mj.keep(S.lm.resid_post[-1])}  # fmt: skip
    out = mj.run(tiny_model, batch, edits, asked)
    z, v, p, x = (np.asarray(out[name], np.float64) for name in asked)
    lm, last = tiny_model.lm, batch.last
    kernel = np.asarray(lm.layers.attn.o.kernel[...], np.float64).reshape(4, 4, 8, -1)
    for b, t in enumerate(last):
        rms = np.sqrt((x[b, t] ** 2).mean() + lm.norm.eps)
        row = np.asarray(lm.head.kernel[...])[:, 5] * np.asarray(lm.norm.scale[...]) / rms
        for layer in range(4):
            for head in range(4):
                read = kernel[layer, head] @ row
                want = z[layer, b, t, head] @ read
                np.testing.assert_allclose(found.heads[layer, b, head], want, atol=1e-5)
                if (layer, head) != (2, 1):
                    by_token = p[layer, b, head, t] * (v[layer, b, :, head // 2] @ read)
                    np.testing.assert_allclose(found.by_token[layer, b, head], by_token, atol=1e-5)
    np.testing.assert_allclose(found.total, out.logits[:, 5], rtol=0, atol=1e-4)
    assert not np.asarray(found.mlp[1]).any()
    for b, row in enumerate(batch.valid):
        assert not np.asarray(found.by_token)[:, b, :, ~row].any()


def test_it_is_pure_and_refuses_words_that_are_none(tiny_model, make_batch):
    batch = make_batch(images=(1, 0), words=(7, 9), pad="left")
    found = direct_logits.attribute(tiny_model, batch, 5, 6)
    inside = jax.jit(lambda word: direct_logits.attribute(tiny_model, batch, word, 6).total)(5)
    np.testing.assert_allclose(inside, found.total, atol=1e-5)
    with pytest.raises(ValueError, match="96 are not all ids of the vocabulary, 0 to 95"):
        direct_logits.attribute(tiny_model, batch, 96)
