"""A pass is a pure function: under jit, vmap and grad; it never recompiles, and nothing asked
costs nothing."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import receipts
from mllm_jax.passes import run


@pytest.fixture(scope="module")
def text(make_batch):
    """Without pictures: a smaller program."""
    return make_batch(images=(0, 0), words=(9, 6))


def test_last_all_none(tiny_model, text):
    last, all_, none = (mj.run(tiny_model, text, logits=x).logits for x in run.LOGITS)
    assert none is None and last.shape == (2, 96) and all_.shape == (2, 9, 96)
    np.testing.assert_allclose(last, all_[text.tokens.last], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='logits="first" is not one of last, all, none'):
        mj.run(tiny_model, text, logits="first")


def test_logits_that_are_not_computed_cannot_be_asked_for(tiny_model, text):
    for edits, captures in [(mj.ablate(S.logits), None), (None, {"x": mj.stats(S.logits)})]:
        with pytest.raises(ValueError, match='no logits to edit or capture: logits="none"'):
            mj.run(tiny_model, text, edits, captures, logits="none")


def test_edits_of_logits_are_the_same_at_the_last_token_alone(tiny_model, text):
    value = np.random.default_rng(0).normal(size=(2, 9, 96)).astype(np.float32)
    chain = (
        mj.add(S.logits, value)
        >> mj.scale(S.logits[:48], 2.0, where=tok.last)
        >> mj.patch(S.logits[[5, 6]], 0, 1, where=tok.last)
    )
    asked = {"x": mj.keep(S.logits, where=tok.last)}
    last, all_ = (mj.run(tiny_model, text, chain, asked, logits=x) for x in ("last", "all"))
    np.testing.assert_allclose(last.logits, all_.logits[text.tokens.last], rtol=0, atol=1e-5)
    np.testing.assert_allclose(last["x"][:, 0], last.logits, rtol=0, atol=1e-5)


# Nothing asked.


class Null:
    """The model and nothing else."""

    def module(self, name, lens=None):
        return self

    def only(self, *sites):
        return self

    def idle(self, site, x):
        return True

    def __call__(self, site, x):
        return x

    def scan(self, step, layers, x, extra=None):
        def body(x, inputs):
            layer, more = inputs
            return step(layer, x, self, more)

        return jax.lax.scan(body, x, (layers, extra))

    def loop(self, step, layers, x):
        for layer in layers:
            x = step(layer, x, self)
        return x


def instructions(compiled) -> list[str]:
    """The program without what names it: metadata, and the numbers of its instructions."""
    text = compiled.as_text()
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    names: dict[str, str] = {}
    text = re.sub(r"%[\w.\-]+", lambda m: names.setdefault(m[0], f"%{len(names)}"), text)
    return [line for line in text.splitlines() if " = " in line]


def test_nothing_asked_costs_nothing(tiny_model, make_batch):
    batch = make_batch()

    @jax.jit
    def plain(model, batch):
        x, _ = model(batch, Null())
        return model.logits(jnp.take_along_axis(x, batch.last[:, None, None], 1), Null())[:, 0]

    ours = run.compiled_run.lower(tiny_model, batch, (), {}, logits="last", remat=False).compile()
    theirs = plain.lower(tiny_model, batch).compile()
    assert instructions(ours) == instructions(theirs)
    assert len(instructions(ours)) > 100


# Never again.


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_edits_are_one_program(tiny_model, text, count):
    rng = np.random.default_rng(0)
    kinds = [tok.question, tok.text, tok.every, tok.system, tok.last, tok.last | tok.system]

    def edits():
        layer = [int(rng.integers(4)), slice(int(rng.integers(3)), None), rng.random(4) < 2]
        layer = layer[rng.integers(3)]
        neurons = rng.choice(48, rng.integers(1, 9), replace=False)
        where = [*kinds, tok.mask(rng.random((2, 9)) < 2)][rng.integers(7)]
        return (
            mj.ablate(S.lm.mlp.act[layer, neurons], where=where)
            >> mj.scale(S.lm.resid_post[layer], float(rng.normal()), where=where)
            >> mj.add(S.lm.mlp.gated[layer, neurons], rng.normal(size=len(neurons)), where=where)
        )

    asked = {"x": mj.keep(S.lm.resid_post[0])}
    jax.block_until_ready(mj.run(tiny_model, text, edits(), asked))
    before, found = mj.compiles(), []
    for _ in range(count):
        asked = {"x": mj.keep(S.lm.resid_post[int(rng.integers(4))])}
        found.append(mj.run(tiny_model, text, edits(), asked).logits)
    assert mj.compiles() == before
    assert len({np.asarray(f).tobytes() for f in found}) > 0.75 * count


def test_compiles_counts_programs():
    before = mj.compiles()
    double = jax.jit(lambda x: 2 * x + 0.123)
    double(np.ones(3, np.float32)), double(np.zeros(3, np.float32))
    assert mj.compiles() == before + 1
    double(np.ones(4, np.float32))
    assert mj.compiles() == before + 2


# Transforms.


def test_in_jit_and_in_vmap_it_is_a_loop(tiny_model, text):
    """Layers, neurons, tokens and strengths are traced."""
    rng = np.random.default_rng(0)

    def lane(mask, gate, basis, layer, tokens):
        edits = (
            mj.scale(mask, gate, where=tok.mask(tokens))
            >> mj.project_out(S.lm.resid_post[layer], basis)
            >> mj.ablate(S.lm.mlp.gated[layer, [3, layer]])
            >> mj.knockout(S.lm.attn[layer], to=tok.last, on=tok.mask(tokens))
        )
        out = mj.run(tiny_model, text, edits, {"x": mj.keep(S.lm.resid_post[layer])})
        return out.logits, out["x"], out.receipts

    data = (
        rng.random((3, 4, 48)) < 0.1, np.array([0.0, 2, -1]), rng.normal(size=(3, 32, 2)),
        np.array([1, 3, 0]), rng.random((3, 2, 9)) < 0.7,
    )  # fmt: skip
    rows, jitted = jax.jit(jax.vmap(lane))(*data), jax.jit(lane)
    for i in range(3):
        alone = [a[i] for a in data]
        want = lane(*alone)
        for got in (jax.tree.map(lambda a, i=i: a[i], rows), jitted(*alone)):
            for ours, theirs in zip(got[:2], want[:2], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
            for ours, theirs in zip(got[2], want[2], strict=True):
                np.testing.assert_array_equal(ours.tokens, theirs.tokens)
                np.testing.assert_array_equal(ours.elements, theirs.elements)
                np.testing.assert_allclose(ours.norm, theirs.norm, rtol=1e-4, atol=1e-5)
    assert jitted._cache_size() == 1


# Receipts.


def test_a_receipt_reads_well():
    receipt = receipts.Receipt(
        "ablate lm.mlp.act", np.array([0, 6, 6]), np.array([0, 60, 6]), np.array([0, 3.0, 4.0])
    )
    assert str(receipt) == ("ablate lm.mlp.act: layers 1-2, 6 tokens, 66 elements changed, norm 5")
    nothing = receipts.Receipt("scale logits", np.zeros(1), np.zeros(1), np.zeros(1))
    assert str(nothing) == "scale logits: no layer, 0 tokens, 0 elements changed, norm 0"
