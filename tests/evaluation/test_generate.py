"""Cached generation is recomputation, with edits; it stops, and it samples by its key."""

from __future__ import annotations

import dataclasses

import cases
import jax
import numpy as np
import pytest
from longer import continued, places

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok

STEPS = 32
SEEN: list[np.ndarray] = []


def record(x):
    """An edit that changes nothing, and remembers the logits that it was given."""
    jax.debug.callback(lambda x: SEEN.append(np.asarray(x)), x, ordered=True)
    return x


@pytest.mark.parametrize("pad", ["right", "left"])
def test_cached_is_recomputed(pad, edits, tiny_model, make_batch):
    batch = make_batch(pad=pad, length=16)
    SEEN.clear()
    edits = edits >> mj.call(S.logits, record)
    out = mj.generate(tiny_model, batch, edits, max_new_tokens=STEPS)
    jax.effects_barrier()
    said = np.asarray(out.tokens)
    assert said.shape == (2, STEPS) and len(SEEN) == STEPS + 1 and out.text is None

    whole = continued(batch, said)
    want = mj.run(tiny_model, whole, edits, logits="all")
    for row, at in enumerate(places(batch, said)):
        logits = np.stack([seen[row, 0] for seen in SEEN[:STEPS]])
        np.testing.assert_allclose(logits, want.logits[row, at], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(said[row], logits.argmax(-1))
        np.testing.assert_allclose(
            SEEN[STEPS][row, 0], want.logits[row, at[-1] + 1], rtol=0, atol=1e-4
        )
    for ours, theirs in zip(out.receipts[:4], want.receipts[:4], strict=True):
        assert ours.edit == theirs.edit
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.elements, theirs.elements)
        np.testing.assert_allclose(ours.norm, theirs.norm, rtol=1e-4, atol=1e-4)


def test_edits_change_what_is_said(tiny_model, make_batch):
    """Each case of `test_cached_is_recomputed` but the first: else it would show nothing."""
    batch = make_batch()
    said = {
        name: np.asarray(mj.generate(tiny_model, batch, case).tokens).tobytes()
        for name, case in cases.CASES.items()
    }
    clean = np.asarray(mj.generate(tiny_model, batch).tokens).tobytes()
    assert said["nothing"] == clean
    assert clean not in [tokens for name, tokens in said.items() if name != "nothing"]


@dataclasses.dataclass(frozen=True, eq=False)
class Stub:
    """What generation needs of a processor."""

    stop_ids: np.ndarray

    def text(self, ids, *, stop):
        return [f"{stop} {' '.join(map(str, row))}" for row in np.asarray(ids)]


def test_a_row_stops_at_its_stop_token(tiny_model, make_batch):
    batch = make_batch(words=(11, 8))
    edits = mj.add(S.lm.resid_post[1], 0.5, where=tok.answer)
    free = np.asarray(mj.generate(tiny_model, batch, edits).tokens)
    at = 5
    stop = free[1, at]  # when row 1 stops; row 0 may say it too
    first = [list(row).index(stop) if stop in row else STEPS - 1 for row in free]
    assert first[1] <= at < STEPS and first[0] != first[1]
    known = batch.replace(processor=Stub(np.array([stop, 200], np.int32)))
    out = mj.generate(tiny_model, known, edits, stop=True)
    for row, end in enumerate(first):
        np.testing.assert_array_equal(out.tokens[row, : end + 1], free[row, : end + 1])
        np.testing.assert_array_equal(out.tokens[row, end + 1 :], stop)
    assert out.text == Stub(None).text(out.tokens, stop=True)
    # what a row did after its end, while others went on, is not in the receipt
    ended = sum(min(end + 1, STEPS) for end in first)
    np.testing.assert_array_equal(out.receipts[0].tokens, [0, ended, 0, 0])
    with pytest.raises(ValueError, match="stop=True needs a batch made by a processor"):
        mj.generate(tiny_model, batch, stop=True)


def test_rows_do_not_depend_on_each_other(tiny_model, make_batch):
    batch = make_batch(images=(1, 1), words=(11, 8), length=16)
    other = make_batch(images=(1, 1), words=(11, 8), length=16, seed=3)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), batch, other)
    a, b, c = (np.asarray(mj.generate(tiny_model, x).tokens) for x in (batch, other, mixed))
    np.testing.assert_array_equal(c, [a[0], b[1]])


def test_a_row_that_only_fills_the_batch_says_nothing(tiny_model, make_batch):
    batch = make_batch()
    empty = dataclasses.replace(
        batch.tokens, kind=batch.tokens.kind * np.array([[1], [0]], np.int8),
        last=batch.tokens.last & np.array([[True], [False]]),
    )  # fmt: skip
    edits = mj.add(S.lm.resid_post[1], 0.5)
    whole = mj.generate(tiny_model, batch, edits)
    out = mj.generate(tiny_model, batch.replace(tokens=empty), edits)
    np.testing.assert_array_equal(out.tokens[0], whole.tokens[0])
    np.testing.assert_array_equal(out.tokens[1], -1)
    np.testing.assert_array_equal(out.receipts[0].tokens, [0, 15 + STEPS, 0, 0])


def sampled(model, batch, seed, **how):
    return np.asarray(mj.generate(model, batch, key=jax.random.key(seed), **how).tokens)


def test_sampling_is_by_its_key(tiny_model, make_batch):
    batch = make_batch(images=(0, 0), words=(9, 6))
    a, again, b = (sampled(tiny_model, batch, seed, temperature=1.0) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()
    cold = sampled(tiny_model, batch, 0, temperature=1e-4)
    np.testing.assert_array_equal(cold, mj.generate(tiny_model, batch).tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_samples_have_the_models_probabilities(temperature, tiny_model, make_batch):
    batch = make_batch(images=(0,) * 256, words=(5,) * 256)
    batch.ids[:] = batch.ids[0]
    logits = np.asarray(mj.run(tiny_model, batch).logits[0], np.float64) / temperature
    want = np.exp(logits) / np.exp(logits).sum()
    said = [
        sampled(tiny_model, batch, seed, temperature=temperature, max_new_tokens=1)
        for seed in range(20)
    ]
    share = np.bincount(np.ravel(said), minlength=96) / np.size(said)
    assert abs(share - want).sum() / 2 < 0.06  # 5120 draws of 96 words


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 is below 0"),
        ({"temperature": 1.0}, r"sampling needs key=jax.random.key\(seed\)"),
    ],
)
def test_errors(how, message, tiny_model, make_batch):
    with pytest.raises(ValueError, match=message):
        mj.generate(tiny_model, make_batch(), **how)


def test_an_edit_of_answers_alone_is_no_error(tiny_model, make_batch):
    """In a prompt there is none yet; in a pass over the prompt alone it is one."""
    edits = mj.add(S.lm.resid_post[1], 1.0, where=tok.answer)
    mj.generate(tiny_model, make_batch(), edits)
    with pytest.raises(ValueError, match="selects no token"):
        mj.run(tiny_model, make_batch(), edits)
