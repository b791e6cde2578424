"""Sweeps, generation and scores where attention has windows, blocks or positions on three axes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.passes import clean_pass
from tests.helpers import hf, tiers
from tests.models import text_models as text

torch = hf.torch
STEPS = 32
CASES = {  # name -> how transformers makes the mask of blocks, and the blocks
    "mistral-window": ("", ()),
    "qwen2.5-vl": ("", ()),
    "qwen3-vl": ("", ()),
    "gemma2": ("paligemma", ((0, 99),)),
    "gemma3": ("gemma3", ((1, 8), (8, 10))),
}


def some(*names: str, quick: str):
    """Cases of which all but a few are slow."""
    return tiers.slow_except(quick.split(), names)


def batch_of(make_batch, name: str, words=(12, 5, 9), pad: str = "left", **how):
    _, ours = text.pair(name)
    batch = make_batch(ours.config, images=(0,) * len(words), words=words, pad=pad, **how)
    if ours.config.lm.rope_sections:
        batch = text.with_mrope(batch)
    ends = CASES[name][1]
    return text.with_blocks(batch, ends) if ends else batch


def longer(batch, tokens: np.ndarray):
    """The batch with tokens after each row, which is padded on the left."""
    n = tokens.shape[1]
    steps = np.arange(1, n + 1)
    order = np.concatenate([batch.position, batch.position[:, -1:] + steps], 1)
    kind = np.pad(batch.tokens.kind, ((0, 0), (0, n)), constant_values=tok.CODE["answer"])
    rotary, block = batch.rotary_position, batch.block
    if rotary is not None:
        after = rotary.max((0, 2))[:, None] + steps
        rotary = np.concatenate([rotary, np.broadcast_to(after, (3, *after.shape))], 2)
    return batch.replace(
        ids=np.concatenate([batch.ids, tokens], 1).astype(np.int32),
        position=order.astype(np.int32),
        tokens=dataclasses.replace(batch.tokens, kind=kind),
        rotary_position=rotary,
        block=None if block is None else np.pad(block, ((0, 0), (0, n))),
    )


def reference(name: str, batch, tokens: np.ndarray) -> np.ndarray:
    """The logits of transformers at the last token of the prompt and at each token after it."""
    theirs, _ = text.pair(name)
    with torch.no_grad():
        given = text.inputs(longer(batch, tokens), theirs, CASES[name][0])
        return theirs(**given).logits[:, batch.ids.shape[1] - 1 :].numpy()


@pytest.mark.parametrize("name", some(*CASES, quick="qwen3-vl gemma2"))
def test_greedy_generation_is_that_of_transformers(name, make_batch):
    """Each of 32 tokens is the most likely one in a pass of transformers without a cache."""
    _, ours = text.pair(name)
    batch = batch_of(make_batch, name)
    got = np.asarray(mj.generate(ours, batch, max_new_tokens=STEPS).tokens)
    logits = reference(name, batch, got[:, :-1])
    np.testing.assert_array_equal(logits.argmax(-1), got)
    top = np.sort(logits, -1)
    assert (top[..., -1] - top[..., -2]).min() > 1e-4, "a tie proves nothing"


@pytest.mark.parametrize("name", some("gemma2", "gemma3", "qwen2.5-vl", quick="gemma3"))
def test_scores_are_those_of_transformers(name, make_batch):
    _, ours = text.pair(name)
    batch = batch_of(make_batch, name)
    candidates = np.array([[[5, 6, 7, 8, 9, 10], [3, 4, -1, -1, -1, -1]]] * 3, np.int32)
    got = np.asarray(mj.score(ours, batch, candidates))
    for c in range(2):
        ids = candidates[:, c][:, candidates[0, c] >= 0]
        log_probs = torch.log_softmax(torch.from_numpy(reference(name, batch, ids[:, :-1])), -1)
        want = log_probs.gather(-1, torch.from_numpy(ids[..., None].astype(int)))[..., 0].sum(-1)
        np.testing.assert_allclose(got[:, c], want.numpy(), atol=1e-4)


def logits(out):
    return out.logits


PREFIX = {"mistral-window": (16, 32), "gemma3": (16, 16), "gemma2": (0, 0), "qwen3-vl": (16, 32)}


@pytest.mark.parametrize("name", some(*PREFIX, quick="gemma3"))
def test_sharing_in_a_sweep_changes_nothing(name, make_batch):
    _, ours = text.pair(name)
    batch = batch_of(make_batch, name, words=(44, 40), pad="right", seed=3)
    if name == "gemma3":  # the second block begins before 32 and ends after it
        batch = text.with_blocks(batch, ((3, 14), (25, 36)))
    where = [np.zeros(batch.ids.shape, bool) for _ in range(2)]
    where[0][:, 17:] = where[1][:, 37:] = True
    edits = [
        mj.ablate(S.lm.mlp.act[layer, [1, 2, 3]], where=mask & batch.valid)
        for layer, mask in ((1, where[0]), (0, where[1]))
    ]
    lanes = [mj.interventions.binding.bind(ours, batch, edit, None)[0] for edit in edits]
    lengths = tuple(clean_pass.prefix_length(batch, lane, {}, "last") for lane in lanes)
    assert lengths == PREFIX[name]
    shared, alone = (
        np.asarray(mj.sweep(logits, ours, batch, edits, share=share)) for share in (True, False)
    )
    np.testing.assert_allclose(shared, alone, atol=2e-5)
    clean = np.asarray(mj.run(ours, batch).logits)
    assert np.abs(alone - clean).max((1, 2)).min() > 1e-3
