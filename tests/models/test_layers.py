"""Attention row by row, and after a past, is attention on the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.models import layers
from mllm_jax.numerics import rows


def arrays(past: int, masked: bool):
    rng = np.random.default_rng(0)
    B, T, S, N, K, H = 3, 5, 5, 4, 2, 6
    query = rng.normal(size=(B, T, N, H)).astype(np.float32)
    key, value = rng.normal(size=(2, B, K, S, H)).astype(np.float32)
    mask = rng.random((B, 1, T, S)) < 0.6 if masked else None
    if masked:
        mask[1, 0, 2] = False  # may look nowhere
    before = (key[:, :, :past], value[:, :, :past]) if past else None
    return query, key[:, :, past:], value[:, :, past:], mask, before


def by_hand(query, key, value, mask, past):
    if past is not None:
        key, value = (np.concatenate(pair, 2) for pair in zip(past, (key, value), strict=True))
    groups = query.shape[2] // key.shape[1]
    key, value = (a.repeat(groups, 1) for a in (key, value))
    scores = np.exp(query.transpose(0, 2, 1, 3) @ key.swapaxes(2, 3) / query.shape[-1] ** 0.5)
    scores = scores if mask is None else scores * mask
    return (scores / np.maximum(scores.sum(-1, keepdims=True), 1e-30) @ value).swapaxes(1, 2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("at_once", [2**20, 0])
def test_attention(at_once, past, masked, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ELEMENTS_AT_ONCE", at_once)
    *inputs, before = arrays(past, masked)
    got = jax.jit(lambda *a, past: layers.attention(*a, past=past))(*inputs, past=before)
    np.testing.assert_allclose(got, by_hand(*inputs, before), rtol=0, atol=1e-6)


def test_row_by_row_has_the_same_slope(monkeypatch):
    query, *rest, _ = arrays(0, True)

    def slope(query):
        return jax.jit(jax.grad(lambda q: (layers.attention(q, *rest) ** 2).sum()))(query)

    want = slope(query)
    monkeypatch.setattr(rows, "MAX_ELEMENTS_AT_ONCE", 0)
    np.testing.assert_allclose(slope(query), want, rtol=0, atol=1e-6)


def test_who_reads_the_pattern_sees_all_rows(monkeypatch):
    monkeypatch.setattr(rows, "MAX_ELEMENTS_AT_ONCE", 0)
    inputs = arrays(2, True)
    seen = []
    layers.attention(*inputs[:4], past=inputs[4], pattern=lambda p: seen.append(p.shape) or p)
    assert seen == [(3, 4, 5, 5)]


def test_a_low_rank_change_below_the_digits_of_its_matrix_is_seen():
    """Of the change of each product as much as is there; in the sum of both next to nothing."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((500, 256), (256, 64)))
    a, b = (jnp.asarray(rng.normal(size=s) / 80, jnp.float32) for s in ((256, 3), (3, 64)))
    low = layers.LowRank(weight, a, b, scale=2.0)
    exact, pair = (np.asarray(array, np.float64) for array in (x, 2.0 * np.asarray(a) @ b))
    want = exact @ pair

    def seen(y):
        change = np.asarray(y, np.float64) - exact @ np.asarray(weight, np.float64)
        return (change * want).sum() / (want * want).sum()

    y = low.multiply(x)
    assert y.dtype == low[...].dtype == jnp.bfloat16 and y.shape == (500, 64)
    assert seen(y) == pytest.approx(1, abs=0.05)
    assert seen(jnp.matmul(x, low[...], preferred_element_type=jnp.float32)) < 0.5


def test_a_low_rank_change_is_one_of_the_matrix():
    """Of stacked float32: multiplied, indexed and scanned over as the sum is."""
    rng = np.random.default_rng(0)
    weight, a, b = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 6, 4), (2, 6, 3), (2, 3, 4))
    )
    low = layers.LowRank(jnp.asarray(weight), jnp.asarray(a), jnp.asarray(b), scale=0.5)
    whole = weight + 0.5 * a @ b
    np.testing.assert_allclose(low[...], whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(low[1], whole[1], rtol=0, atol=1e-6)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    _, y = jax.lax.scan(lambda _, layer: (None, layer.multiply(jnp.asarray(x))), None, low)
    np.testing.assert_allclose(y, x @ whole, rtol=0, atol=1e-5)
