"""Means and deviations of statistics are right where the mean is large beside the deviation."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import bound_capture, forms, results

RNG = np.random.default_rng(0)


def stats(x, kind, by=("question", "image")):
    """Of values [B, T, F] as a site of the LM gives them, with NaN where there is padding."""
    bound = bound_capture.BoundCapture(
        form="stats", site=S.lm.mlp.act, by=by, k=0, count=1, single=False, slots=None, order=None,
        absent=None, units=None, tokens=kind > 0, kind=kind, on=None, rows=np.ones(len(kind), bool),
        readers=None,
    )  # fmt: skip
    x = np.where(kind[..., None] > 0, x, np.nan)
    return jax.tree.map(np.asarray, forms.read_layer(bound, x, None))


def kinds(rows=3, length=40):
    codes = [tok.CODE[name] for name in ("pad", "question", "image")]
    return RNG.choice(codes, (rows, length), p=[0.2, 0.5, 0.3]).astype(np.int8)


@pytest.mark.parametrize("mean", [0, 1.0, 1e4, -1e6])
@pytest.mark.parametrize("batches", [1, 5])
def test_std_of_a_large_mean(batches, mean):
    drawn = []
    for _ in range(batches):
        kind = kinds()
        drawn.append(((mean + RNG.normal(size=(*kind.shape, 6))).astype(np.float32), kind))
    total = functools.reduce(results.Stats.merge, (stats(x, k).wide() for x, k in drawn))
    for number, name in enumerate(total.kinds):
        picked = np.concatenate([x[k == tok.CODE[name]] for x, k in drawn]).astype(np.float64)
        assert (total.tokens[number] == len(picked)).all()
        np.testing.assert_allclose(total.mean[..., number], picked.mean(0), rtol=1e-6, atol=1e-5)
        # What is merged are sums in float32: at 1e6 they are off by a tenth a token.
        rtol = 1e-2 if batches > 1 and abs(mean) > 1e5 else 1e-4
        np.testing.assert_allclose(total.std[..., number], picked.std(0), rtol=rtol)
        squares = (picked**2).sum(0)
        np.testing.assert_allclose(total.squares[..., number], squares, rtol=1e-5)


def test_one_kind_and_an_outlier():
    """The first token of a prompt may be a thousand times as large as all others."""
    kind = np.full((2, 30), tok.CODE["question"], np.int8)
    x = RNG.normal(size=(2, 30, 3)).astype(np.float32)
    x[:, 0] = 3e3
    found = stats(x, kind, by=None)
    assert found.kinds == () and found.std.shape == (3,)
    np.testing.assert_allclose(found.std, x.reshape(-1, 3).astype(float).std(0), rtol=1e-5)
    rest = stats(x[:, 1:], kind[:, 1:], by=None)
    np.testing.assert_allclose(rest.std, x[:, 1:].reshape(-1, 3).astype(float).std(0), rtol=1e-5)


def test_a_constant_does_not_vary():
    kind = kinds()
    total = stats(np.full((*kind.shape, 2), 0.1, np.float32), kind).wide()
    total = total.merge(total).merge(total)
    assert (total.std < 1e-6).all()


def test_merging_in_any_order_and_with_nothing():
    parts = [stats(5 + RNG.normal(size=(*k.shape, 4)), k).wide() for k in (kinds(), kinds(1, 7))]
    none = stats(np.zeros((2, 5, 4)), np.zeros((2, 5), np.int8)).wide()
    one, other = (functools.reduce(results.Stats.merge, order)
                  for order in (parts, parts[::-1]))  # fmt: skip
    np.testing.assert_array_equal(one.centred, other.centred)
    np.testing.assert_array_equal(one.merge(none).centred, one.centred)
    assert np.isnan(none.mean).all() and np.isnan(none.std).all() and not none.tokens.any()
