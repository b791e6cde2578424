"""Low-rank changes of matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.models import layers


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
