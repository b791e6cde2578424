"""Chains of edits of one structure, in which all but some edits are without effect.

One program is compiled for all cases; only arrays differ.
"""

from __future__ import annotations

import numpy as np

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok

V = np.random.default_rng(0).normal(size=32).astype(np.float32)


def chain(
    scale=(1.0, tok.all), add=(0.0, tok.all), patch=(0, 0, tok.last), cut=(tok.last, tok.answer)
):
    """Scale a gate, add a vector, patch a residual, cut attention. By default nothing changes."""
    act = S.lm.mlp.act[1:3, [1, 5, 9, 20]]
    return (
        mj.scale(act, scale[0], where=scale[1])
        >> mj.add(S.lm.resid_post[[0, 2]], add[0] * V, where=add[1])
        >> mj.patch(S.lm.resid_mid[1], *patch[:2], where=patch[2])
        >> mj.knockout(S.lm.attn[1:], to=cut[0], on=cut[1])
    )


CASES = {
    "nothing": chain(),
    "ablate": chain(scale=(0.0, tok.all)),
    "ablate answer": chain(scale=(0.0, tok.answer)),
    "add answer": chain(add=(2.0, tok.answer)),
    "add image": chain(add=(2.0, tok.image)),
    "add last": chain(add=(2.0, tok.last)),
    "add last and answer": chain(add=(2.0, tok.last | tok.answer)),
    "patch image": chain(patch=(0, 1, tok.image)),
    "patch answer": chain(patch=(1, 0, tok.answer)),
    "patch last and answer": chain(patch=(0, 1, tok.last | tok.answer)),
    "cut image from answer": chain(cut=(tok.answer, tok.image)),
    "cut all from answer": chain(cut=(tok.answer, tok.text & ~tok.answer)),
    "cut image from question": chain(cut=(tok.question, tok.image)),
    "all": chain((-1.0, tok.image), (1.0, tok.text), (0, 1, tok.answer), (tok.answer, tok.row(0))),
}
