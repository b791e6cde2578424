"""A sweep that shares what is clean has the numbers of one pass for each edit, in every family."""

from __future__ import annotations

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from tests.helpers import random_inputs, tiny, tiny_families

NAMES = sorted(set(tiny_families.CONFIGS) - {"gemma3_text"})
QUICK = {"qwen2_5_vl": {"tower"}}  # (its tower has windows by layer)
PICTURES = [[tiny.picture(0, 40, 60)], [tiny.picture(1, 90, 30)], [tiny.picture(2, 24, 24)]]
PROMPTS = ["what is it ?", "is it a cat or a dog ?", "yes no"]
EDITS = {
    "tower": [mj.scale(S.vision.mlp.act[layer, :8], 3.0) for layer in (1, 0, 1)],
    "lm": [mj.ablate(S.lm.mlp.act[layer, ::2], where=tok.last) for layer in (2, 0, 3)],
}


def logits(out):
    return out.logits


@pytest.mark.parametrize(
    "name, module",
    [
        pytest.param(n, m, marks=() if m in QUICK.get(n, ()) else pytest.mark.slow)
        for n in NAMES
        for m in EDITS
    ],
)
def test_what_is_shared(name, module):
    model = random_inputs.random_model(tiny_families.CONFIGS[name])
    batch = tiny_families.processor(name)(PICTURES, PROMPTS)
    swept = np.asarray(mj.sweep(logits, model, batch, EDITS[module]))
    alone = np.stack([mj.run(model, batch, edit).logits for edit in EDITS[module]])
    np.testing.assert_allclose(swept, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    assert np.abs(alone[0] - alone[1]).max() > 1e-3 * np.abs(alone).max()
