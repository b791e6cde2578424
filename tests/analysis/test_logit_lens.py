import numpy as np
import pytest

from mllm_jax.analysis import logit_lens


def test_curve_is_the_mean_over_tokens_not_over_examples():
    tokens = np.array([[2, 1], [6, 0]])  # the second example has no token of the second kind
    entropy = np.array([[[1.0, 5.0], [2.0, 6.0]], [[3.0, 0.0], [4.0, 0.0]]])  # [N, L, kinds]
    curve = logit_lens.entropy_curve(entropy * tokens[:, None, :], tokens)
    np.testing.assert_allclose(curve.value, [[(2 * 1 + 6 * 3) / 8, 5], [(2 * 2 + 6 * 4) / 8, 6]])
    assert curve.low.shape == curve.high.shape == (2, 2)
    assert (curve.low <= curve.value).all() and (curve.value <= curve.high).all()
    assert (curve.low[:, 0] == [1, 2]).all() and (curve.high[:, 0] == [3, 4]).all()


def test_errors():
    with pytest.raises(ValueError, match=r"sums must be \[N, L, kinds\]"):
        logit_lens.entropy_curve(np.ones((4, 3, 2)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="no example has a token of this kind"):
        logit_lens.entropy_curve(np.ones((4, 3, 2)), np.array([[1, 0]] * 4))
