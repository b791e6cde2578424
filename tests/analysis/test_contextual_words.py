"""Nearest contextual words: cosines and their order are those of a loop in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.analysis import contextual_words

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_neighbours_are_the_largest_cosines_whatever_the_lengths():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(30, 8)) * rng.uniform(0.1, 50, size=(30, 1))
    states = rng.normal(size=(7, 8)) * rng.uniform(0.1, 50, size=(7, 1))
    states[3] = -4 * bank[11]
    states[5] = 1e30 * bank[11]
    found = contextual_words.nearest(states, bank, k=4)
    for n, state in enumerate(states):
        cosine = [
            float(np.dot(state, word) / (np.linalg.norm(state) * np.linalg.norm(word)))
            for word in bank
        ]
        want = sorted(range(30), key=lambda i: -cosine[i])[:4]
        assert found.words[n].tolist() == want
        np.testing.assert_allclose(found.cosine[n], [cosine[i] for i in want], atol=1e-6)
    assert found.words[5, 0] == 11 and 11 not in found.words[3]


def test_equal_words_come_in_the_order_of_the_bank_and_zeros_are_like_nothing():
    bank = np.array([[0, 1], [2, 0], [0, 0], [1, 0]], np.float32)
    found = contextual_words.nearest(np.array([[3, 0], [0, 0]], np.float32), bank, k=3)
    assert found.words.tolist() == [[1, 3, 0], [0, 1, 2]]
    assert found.cosine.tolist() == [[1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("states", "bank", "k", "says"),
    [
        (np.zeros((2, 3)), np.zeros((4, 5)), 1, r"states are \(2, 3\) and the bank is \(4, 5\)"),
        (np.zeros((2, 3)), np.zeros((4, 3)), 5, "k=5: the bank holds 4 words"),
        (np.zeros((2, 3)), np.zeros((4, 3)), 0, "k"),
        (np.full((2, 3), np.nan), np.zeros((4, 3)), 1, "states"),
        (np.zeros(3), np.zeros((4, 3)), 1, r"\[n, D\]"),
    ],
)
def test_what_does_not_fit_is_refused(states, bank, k, says):
    with pytest.raises(ValueError, match=says):
        contextual_words.nearest(states, bank, k)


def test_no_states_have_no_neighbours():
    found = contextual_words.nearest(np.zeros((0, 3)), np.ones((4, 3)), k=2)
    assert found.words.shape == found.cosine.shape == (0, 2)
