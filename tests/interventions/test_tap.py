"""However a pass is cut up, it is the same pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions.tap import Taps
from mllm_jax.passes import run

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


def test_rematerialised_it_is_the_same(model, make_batch):
    batch = make_batch(images=(0, 0))
    a, b = (mj.run(model, batch, EDITS, ASKED, remat=remat) for remat in (False, True))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_a_backward_pass_keeps_products_or_nothing_of_a_layer(remat, model, make_batch):
    """Of each layer what enters it, and its products with weights; never [T, T]."""
    batch, lm = make_batch(images=(0, 0)), model.config.lm
    (B, T), L = batch.ids.shape, lm.layers

    def loss(embed):
        changed = mj.replace(S.lm.embed, embed)
        return mj.run(model, batch, changed, logits="last", remat=remat).logits.sum()

    _, back = jax.vjp(loss, np.ones((B, T, lm.width), np.float32))
    kept = [leaf.shape for leaf in jax.tree.leaves(back) if leaf.shape[:1] == (L,)]
    assert not any(shape[-2:] == (T, T) for shape in kept)
    widths = sorted(shape[-1] for shape in kept if shape[1:-1] == (B, T))
    queries, keys = lm.heads * lm.head_width, lm.kv_heads * lm.head_width
    products = [queries, keys, keys, lm.width, lm.mlp, lm.mlp]
    assert widths == sorted([lm.width] + ([] if remat else products)), kept
