"""What a capture selects may be known only when the program runs: nothing selected is not zero."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(images=(0, 0), words=(9, 6))


@pytest.mark.slow
def test_layers_and_units_out_of_range_select_nothing(tiny_model, batch):
    """Of the 4 layers and 48 units: outside of jit this is an error."""

    @jax.jit
    def read(layer, layers, units):
        asked = {
            "one": mj.keep(S.lm.mlp.act[layer]),
            "many": mj.mean(S.lm.mlp.act[layers]),
            "fire": mj.stats(S.lm.mlp.act[layers]),
            "units": mj.keep(S.lm.mlp.act[1, units]),
            "counted": mj.stats(S.lm.mlp.act[1, units]),
        }
        return mj.run(tiny_model, batch, None, asked, logits="none").captures

    asked = {
        "all": mj.keep(S.lm.mlp.act), "mean": mj.mean(S.lm.mlp.act), "fire": mj.stats(S.lm.mlp.act)
    }  # fmt: skip
    want = mj.run(tiny_model, batch, None, asked, logits="none").captures
    close = {"rtol": 0, "atol": 1e-5}

    right = read(-1, np.array([2, -4, 2]), np.array([47, -48]))
    np.testing.assert_allclose(right["one"], want["all"][3], **close)
    np.testing.assert_allclose(right["many"], want["mean"][np.array([2, 0, 2])], **close)
    np.testing.assert_allclose(right["units"], want["all"][1][..., [47, 0]], **close)

    found = read(4, np.array([2, 4, -5]), np.array([48, 3, -49]))
    assert np.isnan(found["one"]).all() and found["one"].shape == want["all"][3].shape
    np.testing.assert_allclose(found["many"][0], want["mean"][2], **close)
    assert np.isnan(found["many"][1:]).all()
    assert found["fire"].tokens.tolist() == [15, 0, 0]
    np.testing.assert_array_equal(found["fire"].positive[0], want["fire"].positive[2])
    assert not np.asarray(found["fire"].positive[1:]).any()
    np.testing.assert_allclose(found["units"][..., 1], want["all"][1][..., 3], **close)
    valid = batch.valid[..., None]
    assert (np.isnan(found["units"][..., ::2]) == valid).all()
    positive = found["counted"].positive
    assert positive.tolist() == [0, int(want["fire"].positive[1][3]), 0]


def test_a_selector_that_selects_nothing(tiny_model, make_batch):
    batch = make_batch(images=(0, 1, 0), words=(9, 6, 4), length=12)
    real = np.array([True, True, False])[:, None]  # the third row only fills up
    kind, last = np.where(real, batch.tokens.kind, 0), batch.tokens.last & real
    batch = batch.replace(tokens=dataclasses.replace(batch.tokens, kind=kind, last=last))
    asked = {
        "mean": mj.mean(S.lm.resid_post[1], where=tok.image),
        "tower": mj.mean(S.vision.resid_post[1]),
        "mass": mj.mass(S.lm.attn.pattern[1], on=tok.text, where=tok.image),
        "fire": mj.stats(S.lm.mlp.act, where=tok.answer),
        "lens": mj.lens(S.lm.resid_post[1], by=("answer",)),
    }
    found = jax.jit(lambda batch: mj.run(tiny_model, batch, None, asked).captures)(batch)
    for name in ("mean", "tower", "mass"):
        assert np.isnan(found[name][0]).all(), name
        assert np.isfinite(found[name][1]).all() and np.asarray(found[name][1]).any(), name
        assert not np.asarray(found[name][2]).any(), name
    fire, lens = found["fire"], found["lens"]
    for array in (fire.tokens, fire.positive, fire.sum, lens.tokens, lens.sum):
        assert not np.asarray(array).any()
    assert (np.asarray(fire.max) == -np.inf).all() and np.isnan(fire.mean).all()
