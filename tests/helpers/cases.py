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
    scale=(1.0, tok.every), add=(0.0, tok.every), patch=(0, 0, tok.last), cut=(tok.last, tok.answer)
):
    """Scale a gate, add a vector, patch a residual, cut attention. By default nothing changes."""
    act = S.lm.mlp.act[1:3, [1, 5, 9, 20]]
    return (
        mj.scale(act, scale[0], where=scale[1])
        >> mj.add(S.lm.resid_post[[0, 2]], add[0] * V, where=add[1])
        >> mj.patch(S.lm.resid_mid[1], *patch[:2], where=patch[2])
        >> mj.knockout(S.lm.attn[1:], to=cut[0], on=cut[1])
    )


STRENGTHS = np.array([0.5, -1.0, 0.0, 2.0], np.float32)


def stepped(strengths, value):
    """Edits of three kinds with strengths by step, and one with a value by token [B, T, D]."""
    some = (
        mj.ablate(S.lm.mlp.act[1, :20])
        >> mj.add(S.lm.resid_post[2], V, where=tok.answer | tok.image)
        >> mj.project_out(S.lm.resid_mid[[0, 3]], V, where=tok.text)
    )
    return mj.per_step(some, strengths) >> mj.add(S.lm.mlp.out[1], value)


def by_token(batch) -> np.ndarray:
    """A value for every token of the prompt; that of padding must never be seen."""
    noise = np.random.default_rng(2).normal(size=(*batch.valid.shape, 32))
    return np.where(batch.valid[..., None], noise, 1e3).astype(np.float32)


def carried(batch, longer, value) -> np.ndarray:
    """The values of a prompt in the places of a longer batch, the last holding on."""
    out = np.zeros((*longer.valid.shape, 32), np.float32)
    for b, valid in enumerate(batch.valid):
        out[b, : valid.sum()] = value[b, valid]
        out[b, valid.sum() :] = value[b, batch.last[b]]
    return out


def stepped_by_hand(longer, strengths, value):
    """`stepped` with the strength of every token written out."""
    step = np.maximum(np.cumsum(longer.tokens.kind == tok.CODE["answer"], 1), 0)
    at = strengths[np.minimum(step, len(strengths) - 1)][..., None]  # [B, T, 1]
    unit = V / np.linalg.norm(V)
    return (
        mj.scale(S.lm.mlp.act[1, :20], 1 - at)
        >> mj.add(S.lm.resid_post[2], at * V, where=tok.answer | tok.image)
        >> mj.call(S.lm.resid_mid[[0, 3]], _part, where=tok.text, at=at, unit=unit)
        >> mj.add(S.lm.mlp.out[1], value)
    )


def _part(x, at, unit):
    return x - at * (x * unit).sum(-1, keepdims=True) * unit


CASES = {
    "nothing": chain(),
    "ablate": chain(scale=(0.0, tok.every)),
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
