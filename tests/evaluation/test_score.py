"""Scores are the log-likelihoods of full passes over prompt and candidate."""

from __future__ import annotations

import numpy as np
import pytest
from longer import continued, places

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.evaluation import score


def candidates(lengths, seed=0):
    """int32[B, C, A] of random tokens, filled up with -1."""
    lengths = np.asarray(lengths)
    ids = np.random.default_rng(seed).integers(0, 95, (*lengths.shape, lengths.max()))
    return np.where(np.arange(lengths.max()) < lengths[..., None], ids, -1).astype(np.int32)


def full(model, batch, said, edits):
    """Log-likelihood of said tokens in each row, by one pass over everything."""
    logits = np.asarray(mj.run(model, continued(batch, said), edits, logits="all").logits, float)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = places(batch, said)
    return [log_probs[row, at[row], s].sum() for row, s in enumerate(said)]


@pytest.mark.parametrize("pad", ["right", "left"])
def test_scores_with_edits(pad, edits, tiny_model, make_batch):
    batch = make_batch(pad=pad, length=16)
    ids = candidates([[4, 4, 4], [4, 4, 4]])
    got = mj.score(tiny_model, batch, ids, edits)
    want = np.stack([full(tiny_model, batch, ids[:, c], edits) for c in range(3)], 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert got.shape == (2, 3) and got.dtype == np.float32


def test_candidates_of_unequal_length_and_number(tiny_model, make_batch):
    """Eleven: more than are scored together."""
    batch = make_batch(length=16)
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 5, (2, 11))
    lengths[1, 7:] = 0  # row 1 has seven
    ids = candidates(lengths)
    edits = mj.add(S.lm.resid_post[1], 1.0, where=tok.answer | tok.last)
    got = np.asarray(mj.score(tiny_model, batch, ids, edits))
    for c in range(11):
        said = [row[row >= 0] for row in ids[:, c]]
        want = full(tiny_model, batch, [np.append(s, [0] * (4 - len(s))) for s in said], edits)
        lone = [full(tiny_model, batch, [s, s], edits) for s in said if len(s)]
        for row in range(2):
            if lengths[row, c]:
                np.testing.assert_allclose(got[row, c], lone[row][row], rtol=0, atol=1e-4)
                assert np.isfinite(want[row])
    np.testing.assert_array_equal(got[1, 7:], -np.inf)


def test_captures_and_receipts_are_of_the_prompt(tiny_model, make_batch):
    batch, ids = make_batch(length=16), candidates([[4, 2], [1, 3]])
    edits = mj.scale(S.lm.mlp.act[1], 2.0)
    asked = {"x": mj.keep(S.lm.resid_post[2]), "n": mj.stats(S.lm.mlp.act)}
    got = score.score_with(tiny_model, batch, ids, edits, asked)
    want = mj.run(tiny_model, batch, edits, asked)
    np.testing.assert_allclose(got.captures["x"], want["x"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got.captures["n"].tokens, want["n"].tokens)
    np.testing.assert_array_equal(got.receipts[0].tokens, want.receipts[0].tokens)


class Letters:
    """A processor to whom a letter is a token and 0 the end."""

    def answer_ids(self, text):
        return [ord(c) - 64 for c in text] + [0]


def test_candidates_as_text():
    ids = score.candidate_ids(Letters(), [["AB", "C"], ["ABCDE"]], 3)
    assert ids.shape == (3, 2, 8) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0, :, :4], [[1, 2, 0, -1], [3, 0, -1, -1]])
    np.testing.assert_array_equal(ids[1, 0, :6], [1, 2, 3, 4, 5, 0])
    assert (ids[1, 1] == -1).all() and (ids[2] == -1).all()
    shared = score.candidate_ids(Letters(), ["AB", "C"], 2, length=5)
    assert shared.shape == (2, 2, 5)
    np.testing.assert_array_equal(shared[0], shared[1])


def test_text_is_scored_as_its_tokens(tiny_model, make_batch):
    batch = make_batch(length=16)
    got = mj.score(tiny_model, batch.replace(processor=Letters()), ["ABC", "B"])
    ids = score.candidate_ids(Letters(), ["ABC", "B"], 2)
    np.testing.assert_array_equal(got, mj.score(tiny_model, batch, ids))


def test_errors(tiny_model, make_batch):
    batch = make_batch()
    with pytest.raises(ValueError, match="candidates as text need a batch made by a processor; or"):
        mj.score(tiny_model, batch, ["A"])
    with pytest.raises(ValueError, match="no candidates to score"):
        mj.score(tiny_model, batch.replace(processor=Letters()), [])
