"""A sweep is a loop of runs, with what is clean shared."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok


def metric(out):
    return {"logits": out.logits, "elements": out.receipts[0].elements}


EDITS = {
    "layers and neurons": [mj.ablate(S.lm.mlp.act[layer, [1, layer]]) for layer in (1, 2, 3)],
    "all units beside some": [mj.ablate(S.lm.mlp.act[2]), mj.ablate(S.lm.mlp.act[2, [0]])],
    "strengths": [mj.scale(S.lm.resid_post[3], a) for a in (0.0, 0.5, 2.0)],
    "tokens": [mj.ablate(S.lm.resid_mid[2], where=w) for w in (tok.image, tok.text, tok.last)],
    "vision": [mj.ablate(S.vision.mlp.act[layer]) for layer in (0, 1)],
    "two edits": [
        mj.ablate(S.projector.act[0, [i]]) >> mj.add(S.lm.resid_post[i], 1.0) for i in (1, 2)
    ],
}


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_equals_a_loop(edits, chunk, tiny_model, make_batch):
    batch = make_batch()
    rows = mj.sweep(metric, tiny_model, batch, mj.stack(edits), chunk=chunk)
    for i, edit in enumerate(edits):
        alone = metric(mj.run(tiny_model, batch, edit))
        np.testing.assert_allclose(rows["logits"][i], alone["logits"], atol=1e-5)
        np.testing.assert_array_equal(rows["elements"][i], alone["elements"])


def test_another_sweep_of_the_same_structure_does_not_recompile(tiny_model, make_batch):
    batch = make_batch()
    sweep = [mj.ablate(S.lm.mlp.act[layer, [layer]]) for layer in (0, 1, 2)]
    mj.sweep(metric, tiny_model, batch, sweep)
    before = mj.compiles()
    again = [mj.ablate(S.lm.mlp.act[layer, [5, 6, 7]], where=tok.image) for layer in (3, 0, 1)]
    jax.block_until_ready(mj.sweep(metric, tiny_model, batch, again))
    assert mj.compiles() == before


def test_edits_of_two_structures_are_refused():
    with pytest.raises(ValueError, match="edit 1 of the sweep is scale lm.mlp.act"):
        mj.stack([mj.ablate(S.lm.mlp.act), mj.scale(S.lm.mlp.act, 2.0)])
    with pytest.raises(ValueError, match="no edit to sweep"):
        mj.stack([])
