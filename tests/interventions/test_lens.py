"""The logit lens is the model's own head, in bounded memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.llava import model as llava
from mllm_jax.interventions import binding, captures, logit_lens
from mllm_jax.passes import run
from tests.helpers import oracle


@pytest.fixture(scope="module")
def log_probs(model, batch):
    """float64[L, B, T, V], all of them: what a lens never makes."""
    with jax.disable_jit():
        _, seen = oracle.forward(model, batch)
        logits = np.stack([model.lm.lens(x) for x in seen["lm.resid_post"]]).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("where", [None, tok.image, tok.last])
def test_words_and_entropy(where, model, batch, log_probs, monkeypatch):
    """By chunks: the 120 tokens are no multiple of 7. The tests below take them at once."""
    monkeypatch.setattr(logit_lens, "LENS_CHUNK", 7)
    asked = {"x": mj.lens(S.lm.resid_post, k=3, where=where)}
    found = mj.run(model, batch, None, asked, logits="none")["x"]
    mask = tok.of(where).mask(batch.tokens)
    ids = np.argsort(-log_probs, -1)[..., :3]
    best = np.take_along_axis(log_probs, ids, -1)
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    np.testing.assert_array_equal(found.ids, np.where(mask[..., None], ids, -1))
    want = np.where(mask[..., None], best, 0)
    np.testing.assert_allclose(found.log_probs, want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.entropy, np.where(mask, entropy, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("vocab", "platform", "size"),
    [(32064, "cpu", 128), (32064, "cuda", 1024), (152064, "tpu", 384), (10**6, "cuda", 128)],
)
def test_chunks_are_larger_on_accelerators(vocab, platform, size):
    assert logit_lens.chunk_size(vocab, platform) == size


@pytest.mark.parametrize(("platform", "size"), [("cpu", 128), ("cuda", 1024), ("tpu", 1024)])
@pytest.mark.parametrize(
    "asked", [mj.lens(S.lm.resid_post[0]), mj.distribution(S.lm.resid_post[0])]
)
def test_the_platform_of_a_program_decides_its_chunks(platform, size, asked, model):
    x = jax.ShapeDtypeStruct((2, 2048, model.config.lm.width), jnp.float32)

    def found(x):
        if asked.form == "lens":
            return logit_lens.read(x, jnp.ones(x.shape[:2], bool), model.lm.lens, 1)
        return logit_lens.sum_probabilities(x, jnp.ones((*x.shape[:2], 1)), model.lm.lens)

    text = jax.jit(found).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert f"tensor<1x{size}x{model.config.lm.vocab}xf32>" in text
    for other in {128, 1024} - {size}:
        assert f"tensor<1x{other}x{model.config.lm.vocab}xf32>" not in text


@pytest.fixture(scope="module")
def out(model, batch):
    asked = {
        "last": mj.lens(S.lm.resid_post[-1], k=10),
        "kinds": mj.lens(S.lm.resid_post[[2, 0]], by=tok.kind),
        "projector": mj.lens(S.projector.out, k=1),
        "out": mj.keep(S.projector.out),
    }
    return mj.run(model, batch, None, asked, logits="all")


def test_the_last_layer_is_the_models_own_logits(out, batch):
    best, ids = jax.lax.top_k(jax.nn.log_softmax(out.logits), 10)
    valid = batch.valid
    np.testing.assert_array_equal(out["last"].ids[valid], ids[valid])
    np.testing.assert_allclose(out["last"].log_probs[valid], best[valid], rtol=0, atol=1e-4)


def test_by_kind(out, batch, log_probs):
    found = out["kinds"]
    entropy, top = -(np.exp(log_probs) * log_probs).sum(-1), np.exp(log_probs.max(-1))
    assert found.kinds == captures.TOKEN_KINDS["lm"]
    for i, kind in enumerate(found.kinds):
        mask = batch.tokens.kind == tok.CODE[kind]
        for got, want in ((found.sum, entropy), (found.top, top)):
            want = (want[[2, 0]] * mask).sum(-1)
            np.testing.assert_allclose(got[..., i], want, rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(found.tokens[..., i], [mask.sum(-1)] * 2)


@pytest.mark.parametrize("chunk", [7, 128])
@pytest.mark.parametrize("by", [None, tok.kind])
def test_mean_distribution(by, chunk, model, batch, log_probs, monkeypatch):
    """The mean of all probabilities over the tokens of a kind, and over two batches."""
    monkeypatch.setattr(logit_lens, "LENS_CHUNK", chunk)
    asked = {"x": mj.distribution(S.lm.resid_post[[2, 0]], by=by)}
    found = mj.run(model, batch, None, asked, logits="none")["x"]
    masks = {k: batch.tokens.kind == tok.CODE[k] for k in captures.TOKEN_KINDS["lm"]}
    masks = masks if by else {"": batch.valid}
    total = np.stack([np.exp(log_probs)[[2, 0]][:, mask].sum(1) for mask in masks.values()], 1)
    count = np.array([[mask.sum() for mask in masks.values()]] * 2)
    total, count = (total, count) if by else (total[:, 0], count[:, 0])
    np.testing.assert_array_equal(found.tokens, count)
    np.testing.assert_allclose(found.sum, total, rtol=1e-5, atol=1e-6)
    ids, probabilities = found.top(3)
    with np.errstate(invalid="ignore"):
        mean = total / count[..., None]
    np.testing.assert_allclose(
        probabilities, -np.sort(-mean, axis=-1)[..., :3], rtol=1e-5, atol=1e-6
    )
    assert ids.shape == probabilities.shape
    twice = mj.reduce(asked, model, [batch, batch])["x"]
    np.testing.assert_allclose(twice.mean, mean, rtol=1e-5, atol=1e-6)
    assert twice.tokens.dtype == np.int64 and (twice.tokens == 2 * count).all()


def test_what_an_image_token_says_before_it_is_read(out, model, batch):
    logits = np.asarray(model.lm.lens(out["out"]))
    want = np.where(batch.is_real_tile[:, None], logits.argmax(-1), -1)
    np.testing.assert_array_equal(out["projector"].ids[..., 0], want)


# Memory: of the compiled program, without running it.


def program_bytes(config, batch, asked, **lm) -> int:
    """What a program needs beside its arguments, results included, for a model with another LM."""
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, **lm))
    model = nnx.eval_shape(lambda: llava.Llava(config, rngs=nnx.Rngs(0)))
    bound, want = binding.bind(model, batch, None, asked)
    lowered = run.compiled_run.lower(model, batch, bound, want, logits="none", remat=False)
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_no_logits_of_all_tokens_are_kept(tiny_config, make_batch):
    """Of 4 layers, 2048 tokens and 8192 words; the logits of one layer are 64 MB."""
    asked = {"x": mj.lens(S.lm.resid_post, k=5)}
    small, large = (
        program_bytes(
            tiny_config, make_batch(images=(0,) * rows, words=(64,) * rows), asked, vocab=8192
        )
        for rows in (8, 32)
    )
    assert large < 4 * 2048 * 8192 * 4 / 10
    assert large < 2 * small  # of four times the tokens


def test_a_kept_layer_is_carried_not_stacked(tiny_config, make_batch):
    batch = make_batch(images=(0,) * 8, words=(64,) * 8)
    one = 8 * 64 * 32 * 4  # bytes of a residual in one layer
    asked = {"x": mj.keep(S.lm.resid_post[1])}
    few, many = (program_bytes(tiny_config, batch, asked, layers=n) for n in (4, 16))
    assert many < few + one  # twelve layers more


@pytest.mark.parametrize("width", [5, 300, 4096, 5000])
def test_top_k_takes_the_first_of_equals(width):
    rng = np.random.default_rng(width)
    few = rng.integers(0, 4, (6, width)).astype(np.float32)  # many equals
    some = rng.normal(size=(6, width)).astype(np.float32)
    some[:, ::3] = -np.inf
    for x in (few, some, few - 2 * (few == 3)):
        want, got = jax.lax.top_k(x, 5), logit_lens.top_k(x, 5)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("spread", [0.01, 7, 30])
def test_entropy_is_right_to_rounding_over_a_whole_vocabulary(spread):
    rng = np.random.default_rng(0)
    logits = (spread * rng.standard_normal((4, 49152)) + 100).astype(np.float32)
    found = logit_lens._lens(logits, np.ones(4, bool), 2)
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.entropy, -(np.exp(exact) * exact).sum(-1), rtol=0, atol=3e-5)
    best = np.sort(exact, -1)[:, :-3:-1]
    np.testing.assert_allclose(found.log_probs, best, rtol=0, atol=3e-5)
