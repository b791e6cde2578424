import pytest

from mllm_jax.data.sequences import LazySequence


class Squares(LazySequence[int]):
    def __init__(self):
        self.made = []

    def __len__(self):
        return 5

    def item(self, index):
        self.made.append(index)
        return index**2


@pytest.mark.parametrize(
    "index", [0, 4, -1, -5, slice(None), slice(1, 3), slice(None, None, -2), slice(3, 99)]
)
def test_indices_mean_what_they_mean_in_a_list(index):
    assert Squares()[index] == [0, 1, 4, 9, 16][index]


def test_items_are_made_when_they_are_read():
    squares = Squares()
    assert squares.made == []
    assert squares[-2] == 9 and squares.made == [3]
    assert list(squares) == [0, 1, 4, 9, 16] and squares.made == [3, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("index", [5, -6])
def test_an_index_out_of_range_makes_nothing(index):
    squares = Squares()
    with pytest.raises(IndexError):
        squares[index]
    assert squares.made == []
