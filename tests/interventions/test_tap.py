"""However a pass is cut up, it is the same pass."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import run
from mllm_jax.interventions.tap import Taps

EDITS = mj.add(S.lm.resid_post[2:], 1.5, where=tok.last) >> mj.ablate(S.lm.mlp.act[2, [1, 7]])
ASKED = {"one": mj.keep(S.lm.resid_post[1]), "fire": mj.stats(S.lm.mlp.act, by=tok.kind)}


def passed(model, batch, edits, asked, **how):
    taps = Taps(edits, asked, **how)
    logits, _ = run.forward(model, batch, taps)
    return logits, taps.captured, taps.receipt_list()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_split_scan_is_bitwise_the_whole(model, make_batch):
    batch = make_batch(images=(0, 0))
    args = model, batch, *run.bind(model, batch, EDITS, ASKED)
    whole, split = (
        jax.jit(functools.partial(passed, clean=clean))(*args) for clean in ({}, {"lm": 2})
    )
    same(whole, split)
    assert split[-1][0].elements.tolist() == [0, 0, 2 * 32]


@pytest.mark.parametrize("at", [1, 9])
def test_a_scan_may_be_split_anywhere_below_the_first_edit(at, model, pictures):
    edits = mj.ablate(S.lm.mlp.act[2]) >> mj.ablate(S.vision.mlp.act)
    args = model, pictures, *run.bind(model, pictures, edits, ASKED)
    with jax.disable_jit():
        same(passed(*args, clean={"lm": at}), passed(*args))


@pytest.mark.usefixtures("quick_to_compile")
def test_rematerialised_it_is_the_same(model, make_batch):
    batch = make_batch(images=(0, 0))
    a, b = (mj.run(model, batch, EDITS, ASKED, remat=remat) for remat in (False, True))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
