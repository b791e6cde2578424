"""Jacobian lenses: the mean Jacobian is that of forward mode, added up by loops over tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.training import jacobian_lens, lenses

pytestmark = pytest.mark.usefixtures("quick_to_compile")
SEEN = tok.image | tok.question
LAYERS = [1, 2, 3]


@pytest.fixture(scope="module")
def batch(make_batch):
    """Two rows, of other lengths, the first without a picture."""
    return make_batch(images=(0, 1), words=(3, 4))


@pytest.fixture(scope="module")
def found(tiny_model, batch):
    return jacobian_lens.jacobians(tiny_model, batch, LAYERS, where=SEEN)


@pytest.fixture(scope="module")
def whole(tiny_model, batch):
    """The derivatives of each last state by each state, by forward mode: [B, T, D, 2, B, T, D]."""
    B, T = batch.ids.shape
    zero = np.zeros((2, B, T, 32), np.float32)

    def last(shift):
        kept = {"x": mj.keep(S.lm.resid_post[-1])}
        edits = mj.add(S.lm.resid_post[1], shift[:1]) >> mj.add(S.lm.resid_post[2], shift[1:])
        return mj.run(tiny_model, batch, edits, kept, logits="none")["x"].reshape(B, T, 32)

    def column(change):
        return jax.jvp(last, (zero,), (change.reshape(zero.shape),))[1]

    columns = jax.jit(lambda basis: jax.lax.map(column, basis, batch_size=64))
    found = np.asarray(columns(np.eye(zero.size, dtype=np.float32)))
    return np.moveaxis(found, 0, -1).reshape(B, T, 32, *zero.shape)


def test_jacobians_are_those_of_all_tokens_added_up(batch, found, whole):
    mask = np.asarray(SEEN.mask(batch.tokens))
    assert mask.any(-1).all() and not mask.all() and found.rows == 2
    for number in range(2):
        want = np.zeros((32, 32))
        for row in range(2):
            of_row = np.zeros((32, 32))
            for source in np.flatnonzero(mask[row]):
                for target in np.flatnonzero(mask[row]):
                    later = whole[row, target, :, number, row, source]
                    assert target >= source or not later.any()
                    of_row += later
            want += of_row / mask[row].sum()
        np.testing.assert_allclose(found.values[number], want, rtol=1e-4, atol=1e-5)


def test_the_lens_applies_their_mean_to_states(tiny_model, found):
    lens = jacobian_lens.mean([found, found])
    states = np.random.default_rng(0).normal(size=(5, 3, 32)).astype(np.float32)
    mapped = np.asarray(lens(states))
    for token in range(5):
        for number in range(2):
            want = found.values[number] @ states[token, number] / 2
            np.testing.assert_allclose(mapped[token, number], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(mapped[:, -1], states[:, -1])
    compared = lenses.compare(tiny_model, states, lens)
    np.testing.assert_allclose(compared.kl[-1], 0, atol=1e-5)
    assert compared.agrees[-1].all() and compared.kl[:-1].min() > 0


def test_layers_count_from_either_end_and_rows_from_several_batches(tiny_model, batch, found):
    negative = jacobian_lens.jacobians(tiny_model, batch, [-3, -2, -1], where=SEEN)
    np.testing.assert_array_equal(negative.values, found.values)
    twice = jacobian_lens.fit(tiny_model, [batch, batch], LAYERS, where=SEEN)
    np.testing.assert_allclose(twice.weight, jacobian_lens.mean([found]).weight, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "where", "says"),
    [
        ([1, 2], SEEN, r"layers=\[1, 2\]: give two or more in increasing order, .* last, 3"),
        ([3], SEEN, "give two or more"),
        ([2, 1, 3], SEEN, "in increasing order"),
        ([-9, 3], SEEN, "give two or more"),
        (None, tok.answer, "where= selects no token"),
    ],
)
def test_what_does_not_fit_is_refused(layers, where, says, tiny_model, batch):
    with pytest.raises(ValueError, match=says):
        jacobian_lens.jacobians(tiny_model, batch, layers, where=where)


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="there is no batch"):
        jacobian_lens.mean([])
