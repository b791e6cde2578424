"""Batches are the same at the same place, each epoch in its own order."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from mllm_jax.data.embedded.questions import Question
from mllm_jax.training import batches, losses

ANSWERS = ("a cat", "a ship", "tree", "star")


def ask(row: int, epoch: int) -> Question:
    return Question("category", "what is shown ?" + " yes" * epoch, ANSWERS[row], ANSWERS)


@pytest.fixture(scope="module")
def made(processor, features):
    return batches.AnswerBatches(processor, ask, features, size=2, count=6, length=32, seed=3)


class Numbered:
    """Vectors of two heads that say where they are; as a collection, it is read by indices."""

    def __init__(self, count):
        self.value = np.arange(count * 4, dtype=np.float16).reshape(count, 2, 2)

    def __len__(self):
        return len(self.value)

    def __getitem__(self, indices):
        return types.SimpleNamespace(value=self.value[indices])


def test_vectors_are_read_once_an_epoch_in_its_own_order():
    made = batches.VectorBatches(Numbered(10), size=4, count=5, seed=3)
    assert len(made) == 5 and made[2].shape == (4, 4) and made[2].dtype == np.float32
    drawn = np.concatenate([made[i] for i in range(5)])
    np.testing.assert_array_equal(drawn, drawn[:, :1] + np.arange(4))
    one, two = drawn[:10, 0] // 4, drawn[10:, 0] // 4
    assert sorted(one) == sorted(two) == list(range(10)) and (one != two).any()
    np.testing.assert_array_equal(np.concatenate([made[i] for i in range(5)]), drawn)
    other = dataclasses.replace(made, seed=4)
    assert (np.concatenate([other[i] for i in range(5)]) != drawn).any()
    with pytest.raises(IndexError, match="batch 5 of 5"):
        made[5]
    with pytest.raises(ValueError, match="size=0 is not a whole number from 1"):
        batches.VectorBatches(Numbered(10), size=0, count=5)
    with pytest.raises(ValueError, match="has no vector to train on"):
        batches.VectorBatches(Numbered(0), size=4, count=5)


def rows(batch, features) -> list[int]:
    """Which of the features each row has."""
    return [int((features == row).all((1, 2)).argmax()) for row in batch.features]


def test_an_epoch_has_every_example_once_in_its_own_order(made, features):
    assert len(made) == 6
    drawn = [row for i in range(len(made)) for row in rows(made[i], features)]
    epochs = [drawn[i : i + 4] for i in range(0, 12, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and epochs[0] != epochs[1]
    again = [row for i in range(len(made)) for row in rows(made[i], features)]
    other = dataclasses.replace(made, seed=4)
    assert again == drawn
    assert drawn != [row for i in range(len(made)) for row in rows(other[i], features)]
    with pytest.raises(IndexError, match="batch 6 of 6"):
        made[6]


def said(batch, row: int) -> list[str]:
    places = batch.labels[row]
    ids = batch.ids[row, places[places >= 0]]
    return [batch.processor.word(i) for i in ids]


def test_labels_are_the_answer_with_its_end_or_without(made, features):
    for end in (True, False):
        batch = dataclasses.replace(made, end=end)[2]
        for place, row in enumerate(rows(batch, features)):
            assert said(batch, place) == ANSWERS[row].split() + ["<eos>"] * end
            asked = batch.processor.text(batch.ids[[place]], stop=False)[0]
            assert asked.count("yes") == 1  # of the second epoch


def test_the_end_is_not_learned(model, made):
    """The loss is of one token less, and that token does not matter."""
    batch = made[0].replace(processor=None)
    without = batch.replace(labels=batches.without_end(batch.labels))
    (_, all_), (_, some) = (losses.answer_nll(model, b) for b in (batch, without))
    np.testing.assert_array_equal(all_ - 1, some)
