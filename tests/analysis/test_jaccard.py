"""The Jaccard index against Python sets, and its value by chance against random sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_jax.analysis import jaccard

NEURONS = st.sets(st.integers(0, 11))


@given(NEURONS, NEURONS)
def test_index_of_sets(a, b):
    want = len(a & b) / len(a | b) if a | b else 0
    assert jaccard.index(len(a & b), len(a), len(b)) == want
    masks = [np.isin(np.arange(12).reshape(1, 3, 4), list(chosen)) for chosen in (a, b)]
    assert jaccard.of_masks(*masks).tolist() == [want]


def test_by_chance_is_what_random_sets_share():
    rng, total, first, second = np.random.default_rng(0), 400, 60, 90
    shared = [
        len(np.intersect1d(*(rng.choice(total, n, replace=False) for n in (first, second))))
        for _ in range(2000)
    ]
    indices = jaccard.index(shared, first, second)
    assert jaccard.by_chance(first, second, total) == pytest.approx(indices.mean(), rel=0.02)


def test_by_chance_at_the_ends():
    assert jaccard.by_chance(0, 0, 5) == 0 and jaccard.by_chance(5, 5, 5) == 1
