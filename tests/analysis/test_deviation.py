import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.analysis import deviation


@pytest.fixture
def states():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(3, 4, 5, 8))  # [L, B, T, D]
    edited = clean + 0.1 * rng.normal(size=clean.shape)
    weight = rng.random((2, 4, 5)) < 0.6  # [kinds, B, T]
    return clean, edited, weight


def test_agrees_with_a_loop(states):
    clean, edited, weight = states
    found = deviation.finish(deviation.sums(clean, edited, weight))
    for layer in range(3):
        for kind in range(2):
            l2, cosine = [], []
            for b, t in np.argwhere(weight[kind]):
                h, g = clean[layer, b, t], edited[layer, b, t]
                l2.append(np.linalg.norm(g - h) / np.linalg.norm(h))
                cosine.append(1 - h @ g / np.linalg.norm(h) / np.linalg.norm(g))
            assert found.relative_l2[layer, kind] == pytest.approx(np.mean(l2), rel=1e-12)
            assert found.cosine[layer, kind] == pytest.approx(np.mean(cosine), rel=1e-9)


def test_batches_add_up(states):
    clean, edited, weight = states
    whole = deviation.finish(deviation.sums(clean, edited, weight))
    halves = [
        deviation.sums(clean[:, rows], edited[:, rows], weight[:, rows])
        for rows in (slice(0, 1), slice(1, 4))
    ]
    joined = deviation.join(halves)
    assert joined.relative_l2.shape == (3, 2, 4) and joined.tokens.shape == (2, 4)
    for a, b in zip(whole, deviation.finish(joined), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)


def test_runs_under_jit_as_in_numpy(states):
    clean, edited, weight = states
    expected = deviation.sums(clean, edited, weight)
    found = jax.jit(deviation.sums)(jnp.asarray(clean), jnp.asarray(edited), jnp.asarray(weight))
    for a, b in zip(expected, found, strict=True):
        assert isinstance(b, jax.Array) and b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_bfloat16_states_are_measured_in_float32(states):
    clean, edited, weight = (jnp.asarray(x, jnp.bfloat16) for x in states)
    found = deviation.sums(clean, edited, weight)
    exact = deviation.sums(
        *(np.asarray(x.astype(jnp.float32), np.float64) for x in (clean, edited, weight))
    )
    np.testing.assert_allclose(found.relative_l2, exact.relative_l2, rtol=1e-5)


def test_no_change_is_exactly_zero(states):
    clean, _, weight = states
    found = deviation.finish(deviation.sums(jnp.asarray(clean), jnp.asarray(clean), weight))
    assert (found.relative_l2 == 0).all() and (found.cosine == 0).all()


def test_small_angles_survive_float32():
    clean = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 64)), jnp.float32)
    edited = clean.at[0, 0, 0].add(1e-4)
    found = deviation.sums(clean, edited, jnp.ones((1, 1, 1)))
    exact = deviation.sums(np.asarray(clean, float), np.asarray(edited, float), np.ones((1, 1, 1)))
    np.testing.assert_allclose(found.cosine, exact.cosine, rtol=0.02)  # about 1e-10


def test_padding_may_hold_anything(states):
    clean, edited, weight = (x.copy() for x in states)
    expected = deviation.sums(clean, edited, weight)
    edited[:, ~weight.any(axis=0)] = np.nan
    for a, b in zip(expected, deviation.sums(clean, edited, weight), strict=True):
        np.testing.assert_array_equal(a, b)


def test_zero_states_and_kinds_without_tokens():
    clean = np.zeros((1, 2, 3))
    edited = np.array([[[0, 0, 0], [1.0, 0, 0]]])
    weight = np.array([[[1, 1]], [[0, 0]]])
    found = deviation.finish(deviation.sums(clean, edited, weight))
    assert found.relative_l2[0] == found.cosine[0] == 0.5
    assert np.isnan(found.relative_l2[1])


def test_errors(states):
    clean, edited, weight = states
    with pytest.raises(ValueError, match=r"weight \[kinds, B, T\]"):
        deviation.sums(clean, edited, weight[0])
    with pytest.raises(ValueError, match="got shapes"):
        deviation.sums(clean, edited[:, :2], weight)
