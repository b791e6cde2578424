"""Tuned lenses: the last layer is the model's own, and a map that is known is found."""

from __future__ import annotations

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.training import lenses, tuned_lens


@pytest.fixture(scope="module")
def read(tiny_model, make_batch):
    """States [n, L, D] of a batch, the logit lens of the library, and the model's logits."""
    batch = make_batch(images=(0, 0), words=(9, 9))
    asked = {"x": mj.keep(S.lm.resid_post), "lens": mj.lens(S.lm.resid_post, k=1)}
    out = mj.run(tiny_model, batch, None, asked, logits="all")
    states = np.moveaxis(np.asarray(out["x"]), 0, 2).reshape(18, 4, -1)
    return states, out["lens"], np.asarray(out.logits).reshape(18, -1)


def test_the_last_layer_is_the_models_own_distribution(tiny_model, read):
    states, lens, logits = read
    rng = np.random.default_rng(0)
    random = lenses.AffineLens(
        rng.normal(size=(3, 32, 32)).astype(np.float32), rng.normal(size=(3, 32)).astype(np.float32)
    )
    for maps in (None, random):
        found = lenses.compare(tiny_model, states, maps)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(found.kl[-1], 0, atol=1e-5)
        own = -(np.exp(log_probs) * log_probs).sum(-1)
        np.testing.assert_allclose(found.entropy[-1], own, atol=1e-4)
        assert found.agrees[-1].all()
        assert found.kl[:-1].min() > 0
    # Without a map it is the logit lens.
    found = lenses.compare(tiny_model, states)
    np.testing.assert_allclose(found.entropy, np.asarray(lens.entropy).reshape(4, 18), atol=1e-4)
    want = np.asarray(lens.ids).reshape(4, 18) == logits.argmax(-1)
    np.testing.assert_array_equal(found.agrees, want)


@pytest.mark.slow
def test_a_planted_map_is_found(tiny_model):
    """States of the first layer are those of the last, turned and moved."""
    rng = np.random.default_rng(0)
    last = rng.normal(size=(40, 64, 32)).astype(np.float32)
    turn = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    first = (last @ turn + rng.normal(size=32)).astype(np.float32)
    chunks = np.stack([first, last], 2)
    fitted = tuned_lens.fit(tiny_model, [*chunks] * 10, rate=1e-2)
    assert fitted.losses.shape == (400, 1)
    logit = lenses.compare(tiny_model, chunks[0])
    tuned = lenses.compare(tiny_model, chunks[0], fitted.lens)
    # Step 0 is before any training: the loss is that of the logit lens.
    np.testing.assert_allclose(fitted.losses[0], logit.kl[:-1].mean(-1), rtol=1e-4)
    assert logit.kl[0].mean() > 0.5 and tuned.kl[0].mean() < 0.02
    assert tuned.agrees[0].mean() > 0.8 > 2 * logit.agrees[0].mean()
    assert tuned.kl[0].mean() < fitted.losses[0, 0] / 20


def test_chunks_that_are_none_are_refused(tiny_model):
    with pytest.raises(ValueError, match="there is no chunk of states"):
        tuned_lens.fit(tiny_model, [])
    with pytest.raises(
        ValueError, match=r"a chunk of states is \(5, 1, 32\), expected \[n, L, D\]"
    ):
        tuned_lens.fit(tiny_model, [np.zeros((5, 1, 32), np.float32)])
