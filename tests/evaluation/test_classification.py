"""Classification metrics against scikit-learn, unparsed answers and absent classes included."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.evaluation.metrics import classification

sklearn_metrics = pytest.importorskip("sklearn.metrics")
C = 7


def drawn(seed: int, unparsed: float = 0.2):
    """100 pictures of classes 0 to 4; 3 to 5 are answered but 3 rarely; 6 never occurs."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, 100)
    said = np.where(rng.random(100) < 0.5, truth, rng.integers(0, 6, 100))
    return truth, np.where(rng.random(100) < unparsed, -1, said)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_scikit_learn(seed):
    truth, said = drawn(seed)
    counts = classification.confusion(truth, said, C)
    assert counts.sum() == 100 and counts[:, -1].sum() == (said < 0).sum() > 0
    np.testing.assert_array_equal(
        counts[:, :-1], sklearn_metrics.confusion_matrix(truth, said, labels=range(C))
    )
    assert classification.accuracy(counts) == sklearn_metrics.accuracy_score(truth, said)
    ours = [f(counts) for f in (classification.precision, classification.recall, classification.f1)]
    theirs = sklearn_metrics.precision_recall_fscore_support(
        truth, said, labels=range(C), zero_division=0
    )
    np.testing.assert_allclose(ours, theirs[:3], rtol=0, atol=1e-15)
    occur = sorted({*truth, *said} - {-1})
    assert 6 not in occur
    wanted = sklearn_metrics.f1_score(truth, said, labels=occur, average="macro", zero_division=0)
    assert classification.macro_f1(counts) == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_without_unparsed_answers_it_is_the_default_of_scikit_learn(seed):
    truth, said = drawn(seed, unparsed=0)
    counts = classification.confusion(truth, said, C)
    wanted = sklearn_metrics.f1_score(truth, said, average="macro", zero_division=0)
    assert classification.macro_f1(counts) == pytest.approx(wanted, abs=1e-15)


def test_a_class_that_is_only_answered_counts_and_an_absent_one_does_not():
    counts = classification.confusion([0, 0, 1], [0, 2, 1], 4)
    np.testing.assert_allclose(classification.f1(counts), [2 / 3, 1, 0, 0])
    assert classification.macro_f1(counts) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_an_unparsed_answer_is_wrong_and_no_class():
    counts = classification.confusion([0, 0, 1], [0, -1, 1], 2)
    assert classification.accuracy(counts) == pytest.approx(2 / 3)
    assert classification.precision(counts).tolist() == [1, 1]
    assert classification.recall(counts).tolist() == [0.5, 1]
    nothing = classification.confusion([0, 1], [-1, -1], 2)
    assert classification.macro_f1(nothing) == classification.accuracy(nothing) == 0


def test_table():
    counts = classification.confusion([0, 0, 1], [0, -1, 1], 2)
    first, second = classification.table(counts, ["cat", "dog"])
    assert first == {"class": "cat", "images": 2, "answers": 1, "precision": 1.0, "recall": 0.5,
                     "f1": pytest.approx(2 / 3)}  # fmt: skip
    assert second["class"] == "dog" and isinstance(second["images"], int)


@pytest.mark.parametrize(
    ("truth", "said"), [([0, 1], [0]), ([], []), ([0, 2], [0, 1]), ([0], [2]), ([-1], [0]), ([0], [-2])]
)  # fmt: skip
def test_what_is_wrong_is_refused(truth, said):
    with pytest.raises(ValueError, match="one per picture|class ids lie in 0 to 1"):
        classification.confusion(truth, said, 2)
