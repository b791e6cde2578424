"""Rows before padding: what several of them share."""

from __future__ import annotations

import pytest

from mllm_jax.processors import rows


@pytest.mark.parametrize(
    ("sequences", "count"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3]], 2),
        ([[1, 2], [3, 2]], 0),  # what is the same again later does not count
        ([[1, 2], [1, 2, 3]], 2),
        ([[1, 2]], 2),
        ([[1], []], 0),
        ([], 0),
    ],
)
def test_what_is_the_same_at_the_start(sequences, count):
    assert rows.same_at_start(sequences) == count
