"""LoReFT against its formula, in NumPy and float64: h + R^T (W h + b - R h)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.dictionaries.reft import LoReFT
from mllm_jax.training import edits
from tests.helpers import generation
from tests.helpers.shared_fixtures import batch, model, pictures  # noqa: F401

D, RANK = 32, 3
HERE = S.lm.resid_post[1]


@pytest.fixture(autouse=True, scope="module")
def _quick_to_compile(quick_to_compile):
    """Compile every program of this file quickly."""


def make(seed=0, orthonormal=True) -> LoReFT:
    rng = np.random.default_rng(seed)
    basis, weight = rng.normal(size=(2, D, RANK))
    if orthonormal:  # of a sign that QR does not give
        basis = np.linalg.qr(basis)[0] * [1, -1, 1]
    arrays = {"basis": basis, "weight": weight / D**0.5, "bias": rng.normal(size=RANK)}
    return LoReFT(**{name: array.astype(np.float32) for name, array in arrays.items()})


@jax.jit
def apply(reft, h):
    return reft.decode(reft.encode(h), h)


def formula(h, reft, strength=1.0):
    """One state at a time, as the paper writes it; R is the rows of an orthonormal basis."""
    R, W, b = (np.asarray(x, np.float64).T for x in (reft.basis, reft.weight, reft.bias))
    out = np.array(h, np.float64)
    for place in np.ndindex(out.shape[:-1]):
        state = out[place]
        out[place] = state + strength * R.T @ (W @ state + b - R @ state)
    return out


def test_an_orthonormal_basis_is_used_as_it_is_given():
    reft, h = make(), np.random.default_rng(1).normal(size=(5, D)).astype(np.float32)
    np.testing.assert_allclose(reft.directions, reft.basis, atol=1e-6)
    got = apply(reft, h)
    np.testing.assert_allclose(got, formula(h, reft), atol=1e-5)
    inside = np.asarray(reft.directions).T @ np.asarray(got).T  # is W h + b
    want = np.asarray(reft.weight).T @ h.T + np.asarray(reft.bias)[:, None]
    np.testing.assert_allclose(inside, want, atol=1e-5)


def test_any_basis_is_made_orthonormal_by_gram_and_schmidt():
    reft, columns = make(orthonormal=False), []
    for column in np.asarray(reft.basis, np.float64).T:
        rest = column - sum((c * (c @ column) for c in columns), np.zeros(D))
        columns.append(rest / np.linalg.norm(rest))
    np.testing.assert_allclose(reft.directions, np.stack(columns, 1), atol=1e-5)


def test_the_gradients_are_finite_differences():
    """In float64, of all three arrays, with a basis that is not orthonormal."""
    reft, rng = make(2, orthonormal=False), np.random.default_rng(3)
    h, target = rng.normal(size=(2, 4, D))

    @jax.jit
    def loss(reft):
        return jnp.sum((reft.decode(reft.encode(h), h) - target) ** 2)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), reft)
        slope = jax.jit(jax.grad(loss))(wide)
        for name in ("basis", "weight", "bias"):
            array = getattr(wide, name)
            move = rng.normal(size=array.shape)
            ends = [
                loss(dataclasses.replace(wide, **{name: array + step * move}))
                for step in (1e-5, -1e-5)
            ]
            want = float(ends[0] - ends[1]) / 2e-5
            got = float(np.sum(np.asarray(getattr(slope, name)) * move))
            assert abs(want) > 1e-2
            np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=name)


def test_the_edit_is_the_formula_in_its_layer_at_its_tokens_by_its_strength(model, batch):  # noqa: F811
    reft, states = make(), {"x": mj.keep(S.lm.resid_post), "z": mj.keep(HERE.site.latents[1])}

    def run(strength, where=tok.image, reft=reft):
        edit = reft.edit(HERE, where=where, strength=strength)
        return mj.run(model, batch, edit, states)

    clean, some, full = (run(strength) for strength in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(run(1.0, reft=LoReFT.identity(D, RANK))["x"][0], clean["x"][0])
    x, at = np.asarray(clean["x"]), np.asarray(tok.image.mask(batch.tokens))[..., None]
    for out, strength in ((some, 0.5), (full, 1.0)):
        want = np.where(at, formula(x[1], reft, strength), x[1])
        np.testing.assert_allclose(out["x"][1], want, atol=1e-5)
        np.testing.assert_array_equal(out["x"][0], x[0])
    z = np.where(at, np.asarray(reft.encode(x[1])), 0)
    np.testing.assert_allclose(np.where(at, full["z"], 0), z, atol=1e-5)
    last = run(1.0, where=tok.last)
    moved = np.abs(np.asarray(last["x"][1]) - x[1]).max(-1) > 1e-3
    np.testing.assert_array_equal(moved, tok.last.mask(batch.tokens))
    assert np.abs(np.asarray(full.logits) - clean.logits).max() > 1e-2


def test_the_start_changes_nothing_and_its_rank_is_that_of_a_subspace():
    h = np.random.default_rng(0).normal(size=(6, D)).astype(np.float32)
    for rank in (1, 5):
        start = LoReFT.identity(D, rank, seed=1)
        np.testing.assert_allclose(apply(start, h), h, atol=1e-5)
        assert start.widths == (D, rank, D)
    for rank in (0, D + 1, 1.5):
        with pytest.raises(ValueError, match="rank"):
            LoReFT.identity(D, rank)


def test_training_finds_what_changes_the_answer_and_leaves_the_model(model, batch):  # noqa: F811
    before = jax.tree.map(lambda a: np.array(a), jax.tree.leaves(model))
    start = LoReFT.identity(D, 2)

    def loss(reft, model, batch, key):
        out = mj.run(model, batch, reft.edit(HERE, where=tok.last))
        return -jax.nn.log_softmax(out.logits)[:, 7].mean()

    trained, losses = edits.learn(loss, start, model, [batch] * 25, optax.adam(0.05))
    assert losses[-1] < losses[0] - 1
    for name in ("basis", "weight", "bias"):
        assert np.abs(getattr(trained, name) - getattr(start, name)).max() > 1e-2, name
    R = np.asarray(trained.directions)
    np.testing.assert_allclose(R.T @ R, np.eye(2), atol=1e-5)
    for old, new in zip(before, jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_without_strength_the_pass_is_the_clean_one(model, batch):  # noqa: F811
    clean = mj.run(model, batch)
    for edit in (make().edit(HERE, strength=0.0), LoReFT.identity(D, 4).edit(HERE)):
        np.testing.assert_allclose(mj.run(model, batch, edit).logits, clean.logits, atol=1e-5)


@pytest.mark.slow
def test_generation_with_it_equals_one_pass(model, batch):  # noqa: F811
    edit = make().edit(HERE, where=tok.image | tok.generating)
    generation.assert_equals_one_pass(model, batch, edit)


@pytest.mark.slow
def test_strengths_are_lanes_of_a_sweep(model, batch):  # noqa: F811
    reft = make()
    lanes = [reft.edit(HERE, where=tok.image, strength=s) for s in (0.0, 0.5, 2.0)]
    rows = mj.sweep(_logits, model, batch, lanes)
    for row, lane in zip(rows, lanes, strict=True):
        np.testing.assert_allclose(row, mj.run(model, batch, lane).logits, atol=1e-5)


def _logits(out):
    return out.logits


def test_another_width_and_several_layers_are_refused(model, batch):  # noqa: F811
    with pytest.raises(ValueError, match="reads vectors of 8 and returns 8"):
        mj.run(model, batch, LoReFT.identity(8, 2).edit(HERE))
    with pytest.raises(ValueError, match="one layer of lm.resid_post"):
        make().edit(S.lm.resid_post[1:])
