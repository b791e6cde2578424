"""Scores are the log-likelihoods of full passes over prompt and candidate."""

from __future__ import annotations

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.passes import score
from tests.helpers import cases
from tests.helpers.longer import continued, places

LENGTHS = np.random.default_rng(1).integers(1, 5, (2, 11))  # more than are scored together
LENGTHS[:, :3] = 4
LENGTHS[1, 7:] = 0  # row 1 has seven candidates


@pytest.fixture(autouse=True, scope="module")
def _few_together():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "CHUNK_TOKENS", 64)
        yield


def candidates(lengths) -> np.ndarray:
    """int32[B, C, A] of random tokens, filled up with -1."""
    ids = np.random.default_rng(0).integers(0, 95, (*lengths.shape, 4))
    return np.where(np.arange(4) < lengths[..., None], ids, -1).astype(np.int32)


@pytest.fixture(scope="module")
def prompts(make_batch):
    return {pad: make_batch(pad=pad, length=16) for pad in ("left", "right")}


ASKED = {"x": mj.keep(S.lm.resid_post[2])}


def full(model, batch, said, edits):
    """Log-likelihood [B, A] of each said token by one pass over everything, and that pass."""
    out = mj.run(model, continued(batch, said), edits, ASKED, logits="all")
    logits = np.asarray(out.logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = places(batch, said)
    return np.stack([log_probs[row, at[row], s] for row, s in enumerate(said)]), out


@pytest.mark.parametrize("pad", [pytest.param("right", marks=pytest.mark.slow), "left"])
@pytest.mark.parametrize("case", cases.CASES)
def test_scores_with_edits(case, pad, tiny_model, prompts):
    batch, edits, ids = prompts[pad], cases.CASES[case], candidates(LENGTHS)
    got = score.score_with(tiny_model, batch, ids, edits, ASKED)
    assert got.values.shape == (2, 11) and got.values.dtype == np.float32
    for c in range(3):
        want, out = full(tiny_model, batch, ids[:, c], edits)
        np.testing.assert_allclose(got.values[:, c], want.sum(-1), rtol=0, atol=1e-4)
    for row, valid in enumerate(batch.valid):  # captures and receipts are of the prompt
        want = out["x"][row, : valid.sum()]
        np.testing.assert_allclose(got.captures["x"][row, valid], want, rtol=0, atol=1e-4)
    if case == "ablate":
        np.testing.assert_array_equal(got.receipts[0].tokens, [0, 15 + 12, 15 + 12, 0])


@pytest.mark.parametrize("pad", ["right", "left"])
def test_strengths_by_step_and_values_by_token(pad, tiny_model, prompts):
    batch, ids, value = prompts[pad], candidates(LENGTHS), cases.by_token(prompts[pad])
    got = mj.score(tiny_model, batch, ids, cases.stepped(cases.STRENGTHS, value))
    for c in range(2):
        longer = continued(batch, ids[:, c])
        value_ = cases.carried(batch, longer, value)
        edits = cases.stepped_by_hand(longer, cases.STRENGTHS, value_)
        want, _ = full(tiny_model, batch, ids[:, c], edits)
        np.testing.assert_allclose(got[:, c], want.sum(-1), rtol=0, atol=1e-4)


def test_candidates_of_unequal_length_and_number(tiny_model, prompts):
    """What comes after a short candidate in the full pass cannot be seen by it."""
    batch, ids, edits = prompts["right"], candidates(LENGTHS), cases.CASES["add answer"]
    got = np.asarray(score.score_with(tiny_model, batch, ids, edits, ASKED).values)
    for c in range(11):
        want, _ = full(tiny_model, batch, np.maximum(ids[:, c], 0), edits)
        want = np.where(ids[:, c] >= 0, want, 0).sum(-1)
        want = np.where(LENGTHS[:, c] > 0, want, -np.inf)
        np.testing.assert_allclose(got[:, c], want, rtol=0, atol=1e-4)
    assert np.isinf(got).sum() == 4


class Letters:
    """A processor to whom a letter is a token and 0 the end."""

    def answer_ids(self, text, end=True):
        return [ord(c) - 64 for c in text] + [0] * end


def test_candidates_as_text():
    ids = score.candidate_ids(Letters(), [["AB", "C"], ["ABCDE"]], 3)
    assert ids.shape == (3, 2, 6) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0, :, :4], [[1, 2, 0, -1], [3, 0, -1, -1]])
    np.testing.assert_array_equal(ids[1, 0, :6], [1, 2, 3, 4, 5, 0])
    assert (ids[1, 1] == -1).all() and (ids[2] == -1).all()
    shared = score.candidate_ids(Letters(), ["AB", "C"], 2, length=5)
    assert shared.shape == (2, 2, 5)
    np.testing.assert_array_equal(shared[0], shared[1])


def test_errors(tiny_model, make_batch):
    batch = make_batch()
    with pytest.raises(
        ValueError, match="candidates as strings need a batch made by a processor; or"
    ):
        mj.score(tiny_model, batch, ["A"])
    with pytest.raises(ValueError, match="no candidates to score"):
        mj.score(tiny_model, batch.replace(processor=Letters()), [])


@pytest.mark.parametrize(
    "given", [[["A"]], [["A"], []], [[], ["A"]], np.array([[[1, 2]], [[-1, -1]]])]
)
def test_a_row_without_a_candidate_is_refused(given, tiny_model, make_batch):
    """Its values were -inf, of which the first is the largest."""
    batch = make_batch().replace(processor=Letters())
    with pytest.raises(ValueError, match=r"candidates: row [01] of the batch has none: give each"):
        mj.score(tiny_model, batch, given)
