"""The logit lens is the model's own head, in bounded memory."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import oracle
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import captures, run
from mllm_jax.models import llava


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(images=(2, 1), words=(6, 5))


@pytest.fixture(scope="module")
def log_probs(tiny_model, batch):
    """float64[L, B, T, V], all of them: what a lens never makes."""
    _, seen = oracle.forward(tiny_model, batch)
    logits = np.asarray(tiny_model.lm.lens(np.stack(seen["lm.resid_post"])), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.usefixtures("op_by_op")
class TestValues:
    def test_the_last_layer_is_the_models_own_logits(self, tiny_model, batch):
        asked = {"lens": mj.lens(S.lm.resid_post[-1], k=10)}
        out = mj.run(tiny_model, batch, None, asked, logits="all")
        best, ids = jax.lax.top_k(jax.nn.log_softmax(out.logits), 10)
        valid = batch.valid
        np.testing.assert_array_equal(out["lens"].ids[valid], ids[valid])
        np.testing.assert_allclose(out["lens"].log_probs[valid], best[valid], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("chunk", [1, 5, 128])
    @pytest.mark.parametrize("where", [None, tok.image, tok.last])
    def test_words_and_entropy(self, chunk, where, tiny_model, batch, log_probs, monkeypatch):
        monkeypatch.setattr(captures, "LENS_CHUNK", chunk)
        asked = {"x": mj.lens(S.lm.resid_post, k=3, where=where)}
        found = mj.run(tiny_model, batch, None, asked, logits="none")["x"]
        mask = tok.of(where).mask(batch.tokens)
        ids = np.argsort(-log_probs, -1)[..., :3]
        best = np.take_along_axis(log_probs, ids, -1)
        entropy = -(np.exp(log_probs) * log_probs).sum(-1)
        np.testing.assert_array_equal(found.ids, np.where(mask[..., None], ids, -1))
        want = np.where(mask[..., None], best, 0)
        np.testing.assert_allclose(found.log_probs, want, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found.entropy, np.where(mask, entropy, 0), rtol=0, atol=1e-4)

    def test_by_kind(self, tiny_model, batch, log_probs):
        asked = {"x": mj.lens(S.lm.resid_post[[2, 0]], by=tok.kind)}
        found = mj.run(tiny_model, batch, None, asked, logits="none")["x"]
        entropy, top = -(np.exp(log_probs) * log_probs).sum(-1), np.exp(log_probs.max(-1))
        for i, kind in enumerate(found.kinds):
            mask = batch.tokens.kind == tok.CODE[kind]
            for got, want in ((found.sum, entropy), (found.top, top)):
                want = (want[[2, 0]] * mask).sum(-1)
                np.testing.assert_allclose(got[..., i], want, rtol=1e-5, atol=1e-4)
            np.testing.assert_array_equal(found.tokens[..., i], [mask.sum(-1)] * 2)
        assert found.kinds == captures.KINDS_OF["lm"]

    def test_of_the_projector(self, tiny_model, batch):
        """What an image token says before the language model has read it."""
        asked = {"x": mj.lens(S.projector.out, k=1), "out": mj.keep(S.projector.out)}
        out = mj.run(tiny_model, batch, None, asked, logits="none")
        logits = np.asarray(tiny_model.lm.lens(out["out"]))
        np.testing.assert_array_equal(out["x"].ids[..., 0], logits.argmax(-1))


# Memory: of the compiled program, without running it.


@pytest.fixture(scope="module")
def wide(tiny_config):
    """The tiny model with many words, as shapes alone."""
    lm = dataclasses.replace(tiny_config.lm, vocab=8192)
    config = dataclasses.replace(tiny_config, lm=lm)
    return jax.eval_shape(lambda: _build(config))


def _build(config):
    from flax import nnx

    return llava.Llava(config, rngs=nnx.Rngs(0))


def temporary_bytes(model, batch, asked) -> int:
    bound, want = run.bind(model, batch, None, asked)
    lowered = run._run.lower(model, batch, bound, want, logits="none", remat=False)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("by", [None, tok.kind])
def test_no_logits_of_all_tokens_are_kept(by, wide, make_batch):
    """Of 4 layers, 2048 tokens and 8192 words; the logits of one layer are 64 MB."""
    full = 4 * 2048 * 8192 * 4
    asked = {"x": mj.lens(S.lm.resid_post, k=5, by=by)}
    small, large = (
        temporary_bytes(wide, make_batch(images=(0,) * rows, words=(64,) * rows), asked)
        for rows in (8, 32)
    )
    print("lens", small, large, full)
    assert large < full / 10
    assert large < 2 * small  # of four times the tokens


def test_a_kept_layer_is_carried_not_stacked(tiny_model, make_batch):
    batch = make_batch(images=(0,) * 32, words=(64,) * 32)
    one = 32 * 64 * 32 * 4  # bytes of lm.resid_post in one layer
    none, kept, stacked = (
        temporary_bytes(tiny_model, batch, asked)
        for asked in (None, {"x": mj.keep(S.lm.resid_post[1])}, {"x": mj.keep(S.lm.resid_post)})
    )
    print(none, kept, stacked, one)
    assert kept - none < 4 * one
