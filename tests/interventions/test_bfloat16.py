"""A model in bfloat16: logits, lens and subspaces are of float32 products, rounded nowhere."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.families.llava import model as llava

VOCAB, LAYERS = 3000, 2


@pytest.fixture(scope="module")
def model(tiny_config, random_model):
    lm = dataclasses.replace(tiny_config.lm, vocab=VOCAB, layers=LAYERS)
    config = llava.LlavaConfig.of(tiny_config.vision, lm, fold=2, image_token=VOCAB - 1)
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_model(config))


@pytest.fixture(scope="module")
def batch(model, make_batch):
    return make_batch(model.config, images=(1, 2), words=(23, 17), length=32)


@pytest.fixture(scope="module")
def directions():
    return np.random.default_rng(1).normal(size=(32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def out(model, batch):
    asked = {
        "lens": mj.lens(S.lm.resid_post, k=2),
        "x": mj.keep(S.lm.resid_post),
        "normed": mj.keep(S.lm.norm),
    }
    return mj.run(model, batch, None, asked, logits="all")


def double(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def narrow(x: np.ndarray) -> np.ndarray:
    """float64 numbers as bfloat16 has them."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def head(model, normed: np.ndarray) -> np.ndarray:
    return normed @ double(model.lm.head.kernel[...])


def test_logits_are_of_products_in_float32(model, batch, out):
    """Whether of the last token or of all, and in generation: no two words tie by rounding."""
    want = head(model, double(out["normed"]))
    assert out.logits.dtype == jnp.float32
    valid = batch.valid
    np.testing.assert_allclose(out.logits[valid], want[valid], rtol=0, atol=1e-5)
    last = mj.run(model, batch)
    assert last.logits.dtype == jnp.float32
    rows = np.arange(2), batch.last
    np.testing.assert_allclose(last.logits, want[rows], rtol=0, atol=0.05)  # of other products
    assert (double(last.logits) != narrow(double(last.logits))).mean() > 0.9
    top = np.sort(double(out.logits), -1)[batch.valid]
    rounded = np.sort(narrow(double(out.logits)), -1)[batch.valid]
    assert (top[:, -1] > top[:, -2]).all() and (rounded[:, -1] == rounded[:, -2]).any()


def test_the_lens_is_of_products_in_float32(model, batch, out):
    x = double(out["x"])[:, batch.valid]  # [L, tokens, D]
    scale = double(model.lm.norm.scale[...])
    unit = x / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.lm.eps)
    normed = narrow(narrow(unit) * scale)  # as every norm of the model rounds what it gives
    logits = head(model, normed)
    log_probs = logits - logits.max(-1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    got = out["lens"]
    np.testing.assert_allclose(got.entropy[:, batch.valid], entropy, rtol=0, atol=1e-4)
    best = np.sort(log_probs, -1)[..., :-3:-1]
    np.testing.assert_allclose(got.log_probs[:, batch.valid], best, rtol=0, atol=1e-4)
    assert (got.log_probs[..., 0] > got.log_probs[..., 1])[:, batch.valid].all()


@pytest.mark.parametrize("kind", ["project_out", "patch"])
def test_subspaces_are_computed_in_float32(kind, model, batch, directions):
    """What an edit leaves is the exact result, rounded once to the dtype of the site."""
    place = S.lm.resid_pre[0]
    where = np.zeros(batch.ids.shape, bool)
    where[:, 5:9] = True
    edits = {
        "project_out": mj.project_out(place, directions, where=where),
        "patch": mj.patch(place, 0, 1, basis=directions, where=where),
    }
    asked = {"x": mj.keep(S.lm.embed), "found": mj.keep(place)}
    seen = mj.run(model, batch, edits[kind], asked, logits="none")
    x, found = double(seen["x"]), seen["found"]
    assert found.dtype == jnp.bfloat16
    basis = np.linalg.qr(double(directions))[0]
    onto = basis @ basis.T
    want = x.copy()
    if kind == "project_out":
        want[where] -= x[where] @ onto
    else:
        want[1, 5:9] += (x[0, 5:9] - x[1, 5:9]) @ onto
    np.testing.assert_allclose(double(found), want, rtol=1.01 * 2.0**-8, atol=1e-6)
    left = double(found)[where] @ basis if kind == "project_out" else double(found - want) @ basis
    assert np.abs(left).max() < 2.0**-8 * np.abs(x).max()
