"""However a pass is cut up, it is the same pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import run
from mllm_jax.interventions.tap import Taps

EDITS = mj.add(S.lm.resid_post[2:], 1.5, where=tok.image) >> mj.ablate(S.lm.mlp.act[3, [1, 7]])
ASKED = {
    "one": mj.keep(S.lm.resid_post[1]),
    "two": mj.keep(S.lm.mlp.act[[3, 0], [5, 6]]),
    "all": mj.mean(S.lm.resid_mid),
    "fire": mj.stats(S.lm.mlp.act, by=tok.kind),
    "lens": mj.lens(S.lm.resid_post[2:], k=2),
}


@jax.jit
def whole(model, batch, edits, asked):
    return _pass(model, batch, Taps(edits, asked))


@jax.jit
def split(model, batch, edits, asked):
    return _pass(model, batch, Taps(edits, asked, clean={"lm": 2}))


def _pass(model, batch, taps):
    logits, cache = run.forward(model, batch, taps, "all")
    return logits, cache, taps.captured, taps.receipt_list()


def test_a_split_scan_is_bitwise_the_whole(tiny_model, make_batch):
    batch = make_batch()
    args = tiny_model, batch, *run.bind(tiny_model, batch, EDITS, ASKED)
    ours, theirs = split(*args), whole(*args)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ours[-1][0].elements.tolist() == [0, 0, 8 * 32, 8 * 32]


@pytest.mark.usefixtures("op_by_op")
@pytest.mark.parametrize("at", [0, 1, 2, 3, 9])
def test_a_scan_may_be_split_anywhere_below_the_first_edit(at, tiny_model, make_batch):
    batch = make_batch()
    edits = mj.ablate(S.lm.mlp.act[3]) >> mj.ablate(S.vision.mlp.act[1])
    bound, asked = run.bind(tiny_model, batch, edits, ASKED)
    clean = {"lm": at, "vision": min(at, 1)}
    ours = _pass(tiny_model, batch, Taps(bound, asked, clean=clean))
    theirs = _pass(tiny_model, batch, Taps(bound, asked))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rematerialised_it_is_the_same(tiny_model, make_batch):
    batch = make_batch()
    a, b = (mj.run(tiny_model, batch, EDITS, ASKED, remat=remat) for remat in (False, True))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_taps_leave_nothing_behind(tiny_model, make_batch):
    """The same compiled pass, with edits and without, in any order."""
    batch = make_batch()
    first = mj.run(tiny_model, batch, logits="all").logits
    mj.run(tiny_model, batch, EDITS, ASKED)
    np.testing.assert_array_equal(mj.run(tiny_model, batch, logits="all").logits, first)
