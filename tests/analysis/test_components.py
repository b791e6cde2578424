from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.analysis import components


def test_a_planted_plane_is_found():
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
    truth = rng.normal(size=(50, 2)) * [5.0, 2.0]
    found = components.principal(truth @ plane + 3.0)
    np.testing.assert_allclose(found.share.sum(), 1)
    rebuilt = found.scores @ found.axes + found.centre
    np.testing.assert_allclose(rebuilt, truth @ plane + 3.0, atol=1e-12)
    covariance = np.cov((truth @ plane).T)
    values = np.linalg.eigvalsh(covariance)[::-1][:2]
    np.testing.assert_allclose(found.scores.var(axis=0, ddof=1), values)
    np.testing.assert_allclose(found.share, values / np.trace(covariance))


def test_a_direction_has_one_sign():
    features = np.random.default_rng(1).normal(size=(12, 5))
    found, turned = components.principal(features, 3), components.principal(-features, 3)
    np.testing.assert_allclose(found.axes, turned.axes)
    np.testing.assert_allclose(found.scores, -turned.scores)
    assert (np.take_along_axis(found.axes, np.abs(found.axes).argmax(1)[:, None], 1) > 0).all()


def test_variance_between_domains():
    domain = np.repeat([0, 1], [10, 30])
    apart = np.where(domain[:, None] == 0, 3.0, -1.0) * np.ones((40, 4))
    assert components.between(apart, domain) == pytest.approx(1)
    noise = np.random.default_rng(2).normal(size=(40, 4))
    noise -= np.stack([noise[domain == d].mean(axis=0) for d in (0, 1)])[domain]
    assert components.between(noise, domain) == pytest.approx(0, abs=1e-12)
    expected = (apart**2).sum() / ((apart**2).sum() + (noise**2).sum())
    assert components.between(apart + noise, domain) == pytest.approx(expected)
    assert components.between(np.ones((40, 4)), domain) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: components.principal(np.ones((3, 4)), 4), "k=4: features .3, 4. have 1 to 3"),
        (lambda: components.principal(np.ones(3)), "features must be .N, F."),
        (lambda: components.between(np.ones((3, 4)), np.ones(2)), "domain must be 3 integers"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
