"""Edits whose layers, units, rows and values are traced are the edits with these numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok

LONG = (pytest.mark.slow, pytest.mark.long)

L, B, D, F, N = 4, 4, 32, 48, 4


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(images=(1,) * B, words=(11, 8, 8, 11))


def draw(rng) -> dict:
    """Numbers for `chain`, all in range."""
    source, into = rng.permutation(B)[:2]
    return {
        "layer": np.int32(rng.integers(-L, L)),
        "units": rng.integers(-F, F, 3).astype(np.int32),
        "pairs": np.stack([rng.integers(-L, L, 4), rng.integers(-F, F, 4)], 1).astype(np.int32),
        "low": np.int32(rng.integers(0, L)),
        "head": np.int32(rng.integers(0, N)),
        "column": np.int32(rng.integers(0, 2)),
        "source": np.int32(source),
        "into": np.int32(into),
        "strength": np.float32(rng.normal()),
        "vector": rng.normal(size=D).astype(np.float32),
    }


def chain(n: dict) -> mj.Edits:
    """An edit of every kind."""
    low, layer = n["low"], n["layer"]
    return (
        mj.ablate(S.lm.mlp.act[layer, n["units"]], where=tok.column(n["column"]))
        >> mj.scale(S.lm.mlp.act[n["pairs"]], n["strength"])
        >> mj.add(S.lm.resid_post[low : low + 2], n["vector"], where=tok.text)
        >> mj.patch(S.lm.resid_mid[layer], n["source"], n["into"], where=tok.image)
        >> mj.patch(S.projector.out, n["into"], n["source"])
        >> mj.project_out(S.lm.attn_out[n["low"]], n["vector"], where=tok.last)
        >> mj.replace(S.lm.attn.heads[layer, n["head"]], n["strength"], where=tok.last)
        >> mj.knockout(S.lm.attn[low:, n["head"]], to=tok.last, on=tok.image)
        >> mj.call(S.lm.mlp.out[layer], jnp.sin)
    )


def edited(model, batch, n):
    out = mj.run(model, batch, chain(n))
    return out.logits, out.receipts


def close(a, b, atol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol)


@pytest.fixture(scope="module")
def traced(tiny_model, batch):
    return jax.jit(functools.partial(edited, tiny_model, batch))


@pytest.mark.parametrize(
    "draws", [8, pytest.param(40, marks=pytest.mark.slow), pytest.param(300, marks=LONG)]
)
def test_chains_under_jit_and_vmap_are_those_outside(draws, tiny_model, batch, traced):
    rng = np.random.default_rng(draws)
    numbers = [draw(rng) for _ in range(draws)]
    clean = np.asarray(mj.run(tiny_model, batch).logits)
    outside = [edited(tiny_model, batch, n) for n in numbers]
    for n, want in zip(numbers, outside, strict=True):
        close(traced(n), want)
        assert abs(want[0] - clean).max() > 1e-3
    every = jax.jit(jax.vmap(functools.partial(edited, tiny_model, batch)))
    for i in range(0, draws, 4):
        some = jax.tree.map(lambda *a: np.stack(a), *np.resize(numbers[i : i + 4], 4))
        got = every(some)
        for lane, want in enumerate(outside[i : i + 4]):
            close(jax.tree.map(lambda a, lane=lane: a[lane], got), want)


@pytest.mark.slow
@pytest.mark.parametrize("draws", [15, pytest.param(100, marks=pytest.mark.long)])
def test_gradients_through_traced_chains_are_those_outside(draws, tiny_model, batch):
    def value(learned, n):
        return edited(tiny_model, batch, n | learned)[0].std()

    slope, rng = jax.grad(value), np.random.default_rng(1)
    inside = jax.jit(slope)
    for _ in range(draws):
        n = draw(rng)
        learned = {name: n[name] for name in ("vector", "strength")}
        want = slope(learned, n)
        close(inside(learned, n), want)
        assert all(abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(want))


OUT = {  # numbers that are nowhere, and the edits of the chain that they leave without effect
    "layer": ([L, -L - 1, 2**20], (0, 3, 6, 8)),
    "units": ([[F, -F - 1, 2**20]], (0,)),
    "pairs": ([[(L, 1), (-L - 1, 2), (0, F), (1, -F - 1)]], (1,)),
    "low": ([L, L + 7], (2, 5, 7)),
    "head": ([N, -N - 1], (6, 7)),
    "column": ([-1, 7, 2**16], (0,)),
    "source": ([B, -1], (3, 4)),
    "into": ([B, -1], (3, 4)),
}


@pytest.mark.parametrize("name", OUT)
def test_a_traced_number_out_of_range_selects_nothing(name, traced):
    for value in OUT[name][0]:
        n = draw(np.random.default_rng(3))
        _, receipts = traced(n | {name: np.asarray(value, np.int32)})
        for i, receipt in enumerate(receipts):
            told = receipt.tokens.any(), receipt.elements.any(), receipt.norm.any()
            assert told == ((i not in OUT[name][1]),) * 3, (name, value, receipt.edit)


def test_a_traced_patch_that_does_not_match_copies_nothing(tiny_model, batch):
    """Rows of 11 and 8 words; outside that is an error."""
    clean = np.asarray(mj.run(tiny_model, batch, logits="all").logits)

    @jax.jit
    def run(source, into):
        edit = mj.patch(S.lm.resid_post[1], source, into, where=tok.text)
        out = mj.run(tiny_model, batch, edit, logits="all")
        return out.logits, out.receipts[0]

    for source, into, tokens in ([0], [1], 0), ([B], [1], 0), ([1], [B], 0), ([0], [3], 11):
        logits, receipt = run(np.array(source), np.array(into))
        assert (receipt.tokens[1], bool(receipt.elements.any())) == (tokens, bool(tokens))
        assert (abs(logits - clean).max() > 1e-3) == bool(tokens)
    # Of several pairs those that match are copied, and of two that write one row neither.
    _, receipt = run(np.array([0, 0, 1]), np.array([1, 3, 2]))
    assert receipt.tokens[1] == 11 + 8
    _, receipt = run(np.array([0, 3, 1]), np.array([3, 3, 2]))
    assert receipt.tokens[1] == 8


@pytest.mark.parametrize(
    "site", [S.projector.out, pytest.param(S.lm.resid_post, marks=pytest.mark.slow)], ids=str
)
def test_the_source_of_a_patch_may_be_mapped(site, tiny_model, batch):
    """Over a batch in NumPy, at a site of tiles and at one of rows."""

    def run(source):
        return mj.run(tiny_model, batch, mj.patch(site, source, 1, where=tok.image)).logits

    got = jax.vmap(run)(np.arange(B))
    np.testing.assert_allclose(got, [run(row) for row in range(B)], rtol=0, atol=1e-5)
    assert abs(got[0] - got[2]).max() > 1e-3


def test_captures_of_what_is_not_there_are_no_numbers(tiny_model, batch):
    asked = {"x": mj.keep(S.lm.mlp.act), "fire": mj.stats(S.lm.mlp.act)}
    whole = mj.run(tiny_model, batch, None, asked, logits="none")

    @jax.jit
    def run(layer, layers, units):
        asked = {
            "one": mj.keep(S.lm.mlp.act[layer]),
            "some": mj.keep(S.lm.mlp.act[layers, units]),
            "fire": mj.stats(S.lm.mlp.act[layers]),
        }
        return mj.run(tiny_model, batch, None, asked, logits="none").captures

    found = run(np.int32(-1), np.array([2, 0]), np.array([5, -1, 7]))
    x = np.asarray(whole["x"])
    np.testing.assert_allclose(found["one"], x[-1], atol=1e-5)
    np.testing.assert_allclose(found["some"], x[[2, 0]][..., [5, -1, 7]], atol=1e-5)
    found = run(np.int32(L), np.array([-L - 1, 3]), np.array([F, -F - 1, 7]))
    assert np.isnan(found["one"]).all() and np.isnan(found["some"][0]).all()
    assert np.isnan(found["some"][1][batch.valid][:, :2]).all()
    np.testing.assert_allclose(found["some"][1, ..., 2], x[3, ..., 7], atol=1e-5)
    assert not np.any(found["fire"].tokens[0]) and np.isnan(found["fire"].sum[0]).all()
    np.testing.assert_array_equal(found["fire"].positive[1], whole["fire"].positive[3])
