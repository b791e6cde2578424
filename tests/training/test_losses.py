"""Several questions in a row are answered as each alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax.training import fit, losses
from tests.helpers.lesson import TURNS


@jax.jit
def compiled(model, batch):
    return losses.answer_nll(model, batch)


def answer_nll(model, batch):
    return compiled(model, batch.replace(processor=None))


@pytest.fixture(scope="module")
def alone(model, processor, features):
    """nll and number of tokens of each question by itself."""
    found = {}
    for row, pairs in enumerate(TURNS):
        for question, answer in pairs:
            batch = processor(
                None, [question], answers=[answer], features=features[[row]], length=32
            )
            nll, count = answer_nll(model, batch)
            found[row, question] = float(nll[0]), int(count[0])
    return found


def test_packed_questions_do_not_see_each_other(model, processor, features, alone):
    batch = processor.pack(None, TURNS, features=features, rows=5, length=40)
    nll, count = answer_nll(model, batch)
    for row, pairs in enumerate(TURNS):
        each = [alone[row, question] for question, _ in pairs]
        np.testing.assert_allclose(nll[row], sum(n for n, _ in each), rtol=0, atol=1e-5)
        assert count[row] == sum(c for _, c in each)
    assert nll[4] == count[4] == 0  # it only fills the batch


def test_without_segments_they_would(model, processor, features, alone):
    """So that the test above shows something."""
    batch = processor.pack(None, TURNS[:1], features=features[:1], length=32)
    nll, _ = answer_nll(model, batch.replace(segment=None))
    assert abs(nll[0] - sum(alone[0, q][0] for q, _ in TURNS[0])) > 1e-3


@pytest.mark.parametrize("left", [False, True])
def test_it_is_the_likelihood_of_the_full_pass(left, model, processor, features, alone):
    """Of unequal rows; logits of every token, and a plain loop over the answer."""
    asked, said = ["what is shown ?", "is it a cat ?"], ["a cat", "no"]
    batch = processor(None, asked, answers=said, features=features[[0, 2]], left=left, length=32)
    logits = np.asarray(mj.run(model, batch, logits="all").logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll, count = answer_nll(model, batch)
    for row, question in enumerate(asked):
        answer = np.flatnonzero(batch.tokens.kind[row] == 5)
        want = -sum(log_probs[row, at - 1, batch.ids[row, at]] for at in answer)
        np.testing.assert_allclose(nll[row], want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(nll[row], alone[2 * row, question][0], rtol=0, atol=1e-5)
        assert count[row] == len(answer) == (3, 2)[row]


def test_it_is_minus_the_score(model, processor, features, alone):
    batch = processor(None, ["what is shown ?"], features=features[:1], length=32)
    values = mj.score(model, batch, ["a cat", "a ship"])
    np.testing.assert_allclose(-values[0, 0], alone[0, "what is shown ?"][0], rtol=0, atol=1e-4)


def test_a_batch_without_an_answer_token_is_refused(model, processor, features):
    batch = processor(None, ["what is shown ?"], answers=["a cat"], features=features[:1])
    none = batch.replace(labels=np.full_like(batch.labels, -1), processor=None)
    rest = batch.replace(labels=batch.labels[:, :0], processor=None)
    for empty in (none, rest):
        says = (
            f"^this batch has no answer token to learn: its labels \\(1, {empty.labels.shape[1]}\\)"
        )
        with pytest.raises(ValueError, match=says):
            losses.answer_nll(model, empty)
        with pytest.raises(ValueError, match=f"^tune: step 0: {says[1:]}"):
            fit.fit(model, [empty, batch], fit.Recipe(rate=0.1), label="tune")
        with pytest.raises(ValueError, match=says):
            fit.evaluate(model, [empty])


def test_batches_that_do_not_fit_are_refused(model, processor, features):
    def make(rows, **pictures):
        return processor(None, ["what is shown ?"] * rows, answers=["a cat"] * rows, **pictures)

    one, two = (make(rows, features=features[:rows]) for rows in (1, 2))
    with pytest.raises(ValueError, match="tune: step 0: its batches differ in shape: give the pr"):
        fit.fit(model, [one, two], fit.Recipe(accumulate=2), label="tune")
    # Of one picture the wrong one was the right one.
    with pytest.raises(ValueError, match="test: batch 0 has no vision features of several pict"):
        fit.evaluate(model, [one], label="test")
