"""A selection of one axis means what NumPy's brackets mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mllm_jax.selections import Selection


@pytest.mark.parametrize(
    "number", [2**31, 2**32, 2**32 + 1, 2**40, -(2**31) - 1, -(2**32), -(2**40)]
)
def test_numbers_beyond_int32_are_nowhere(number):
    """They were taken modulo 2**32."""
    for item in (number, [number], np.array([number]), np.array([abs(number)], np.uint64)):
        with pytest.raises(ValueError, match="axis -?2147483647 is out|axis -2147483648 is out"):
            Selection.parse(item).mask(9, "axis")
    want = np.zeros(9, bool)
    for item in (slice(number, None), slice(None, number), slice(1, number), slice(number, 5)):
        want[:] = False
        want[item] = True
        np.testing.assert_array_equal(Selection.parse(item).mask(9, "axis"), want)
    pairs = Selection.parse([(0, 1), (number, 2)])
    with pytest.raises(ValueError, match="layer -?214748364[78] is out of range"):
        pairs.pairs_mask(3, 4, "site")


def test_what_is_no_selection():
    for item in (slice(1.5, 3), slice(0, 2.0), slice("a", None), 1.5, "a"):
        with pytest.raises(TypeError, match="holds integers"):
            Selection.parse(item)
    for item in (True, np.ones((2, 3, 4), bool)):
        with pytest.raises(IndexError, match="a mask of an address has one or two axes"):
            Selection.parse(item)


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


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64])
def test_a_mask_of_integers_is_refused(kind):
    """It was read as the indices 0 and 1."""
    mask = Selection.parse(np.array([0, 1, 1, 0], kind))
    for read in (mask.mask, mask.indices):
        with pytest.raises(ValueError, match="axis: 4 zeros and ones, one for each entry, would"):
            read(4, "axis")
    np.testing.assert_array_equal(mask.indices(5, "axis"), [0, 1, 1, 0])
    both = Selection.parse(np.array([1, 0], kind))
    np.testing.assert_array_equal(both.indices(2, "axis"), [1, 0])


@FEW
@given(st.data())
def test_indices_and_masks_are_those_of_numpy(data):
    size = data.draw(sizes)
    index = data.draw(st.lists(st.integers(-size, size - 1), max_size=4))
    assume(len(index) != size or size < 3 or not set(index) <= {0, 1})  # may be a mask
    want = np.zeros(size, bool)
    want[np.array(index, int)] = True
    for item in (index, np.array(index, np.int64), want):
        np.testing.assert_array_equal(Selection.parse(item).mask(size, "axis"), want)
    got = Selection.parse(index).indices(size, "axis")  # their order and number are kept
    np.testing.assert_array_equal(got, np.arange(size)[np.array(index, int)])
