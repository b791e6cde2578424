"""A selection of one axis means what NumPy's brackets mean."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.selections import Selection

FEW = settings(max_examples=60, deadline=None)
sizes = st.integers(1, 9)
ends = st.none() | st.integers(-12, 12)


@FEW
@given(sizes, ends, ends, st.none() | st.integers(1, 4))
def test_slices_are_those_of_numpy(size, start, stop, step):
    item = slice(start, stop, step)
    want = np.zeros(size, bool)
    want[item] = True
    np.testing.assert_array_equal(Selection.parse(item).mask(size, "axis"), want)
    np.testing.assert_array_equal(Selection.parse(item).indices(size, "axis"), np.flatnonzero(want))


@FEW
@given(st.data())
def test_indices_and_masks_are_those_of_numpy(data):
    size = data.draw(sizes)
    index = data.draw(st.lists(st.integers(-size, size - 1), max_size=4))
    want = np.zeros(size, bool)
    want[np.array(index, int)] = True
    for item in (index, np.array(index, np.int64), want):
        np.testing.assert_array_equal(Selection.parse(item).mask(size, "axis"), want)
    got = Selection.parse(index).indices(size, "axis")  # their order and number are kept
    np.testing.assert_array_equal(got, np.arange(size)[np.array(index, int)])
