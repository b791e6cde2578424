"""Reading on from a cache is reading the whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.interventions import tap
from mllm_jax.models import cache
from mllm_jax.positions import Positions

STEPS = 8


@jax.jit
def read(lm, ids, position, valid, past=None):
    return lm(lm.embeddings(ids), Positions(position, valid), tap.Taps().module("lm"), past)


@jax.jit
def step(lm, ids, position, past, slot):
    """One token a row, and the cache with it."""
    out, new = read(lm, ids, position, jnp.ones(position.shape, bool), past)
    return out, past.write(new, slot)


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("pad", ["right", "left"])
def test_token_by_token_is_the_full_pass(pad, make_batch, tiny_model):
    lm, words = tiny_model.lm, (12, 5, 9)
    prompt = make_batch(images=(0, 0, 0), words=words, pad=pad)
    T = prompt.ids.shape[1]
    answer = np.random.default_rng(1).integers(0, lm.config.vocab, (len(words), STEPS), np.int32)

    out, past = read(lm, prompt.ids, prompt.position, prompt.valid)
    past = past.extended(STEPS)
    outs = [out]
    for i in range(STEPS):
        position = np.array(words, np.int32)[:, None] + i
        new, past = step(lm, answer[:, i : i + 1], position, past, T + i)
        outs.append(new)
    outs, past = np.concatenate(outs, 1), numpy(past)
    real = past.valid
    np.testing.assert_array_equal(real[:, :T], prompt.valid)

    whole = make_batch(images=(0, 0, 0), words=[n + STEPS for n in words])  # in one go
    for row, n in enumerate(words):
        whole.ids[row, : n + STEPS] = [*prompt.ids[row][prompt.valid[row]], *answer[row]]
    want, full = numpy(read(lm, whole.ids, whole.position, whole.valid))
    np.testing.assert_allclose(outs[real], want[whole.valid], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(past.position[real], whole.position[whole.valid])
    for ours, theirs in ((past.key, full.key), (past.value, full.value)):
        ours, theirs = ours.swapaxes(2, 3)[:, real], theirs.swapaxes(2, 3)[:, whole.valid]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_several_tokens_at_once_after_slots_not_written(make_batch, tiny_model):
    lm = tiny_model.lm
    batch = make_batch(images=(0, 0, 0), words=(12, 5, 9), pad="left")
    inputs = batch.ids, batch.position, batch.valid
    want, _ = numpy(read(lm, *inputs))
    _, past = read(lm, *(a[:, :7] for a in inputs))
    past = past.extended(3)
    past = dataclasses.replace(past, key=past.key.at[..., 7:, :].set(9.0))  # never to be seen
    got, new = numpy(read(lm, *(a[:, 7:] for a in inputs), past))
    valid = batch.valid[:, 7:]
    np.testing.assert_allclose(got[valid], want[:, 7:][valid], rtol=0, atol=1e-5)
    assert new.key.shape[3] == 5


def test_write_puts_slots_in_place():
    def make(slots, fill):
        kv, at = np.full((2, 1, 1, slots, 2), fill, np.float32), np.full((1, slots), fill)
        return cache.Cache(kv, kv + 1, at.astype(np.int32), at > 0)

    written = make(3, 0).extended(2).write(make(2, 7), 2)
    np.testing.assert_array_equal(written.key[0, 0, 0, :, 0], [0, 0, 7, 7, 0])
    np.testing.assert_array_equal(written.value[1, 0, 0, :, 1], [1, 1, 8, 8, 0])
    np.testing.assert_array_equal(written.position[0], [0, 0, 7, 7, 0])
    np.testing.assert_array_equal(written.valid[0], [False, False, True, True, False])
