"""A padded batch has the numbers of its rows alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok

ASKED = {
    "fire": mj.stats(S.lm.mlp.act, by=tok.kind),
    "projector": mj.stats(S.projector.act, by=tok.kind),
    "mean": mj.mean(S.lm.resid_post),
}
EDITS = mj.add(S.lm.resid_post[1], 1.0) >> mj.scale(S.projector.act, 0.5)
IMAGES, WORDS = (2, 1), (6, 9)
CLOSE = {"rtol": 0, "atol": 1e-5}
FEATURES = np.random.default_rng(0).normal(size=(4, 16, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def alone(tiny_model, make_batch):
    """Each row by itself, without padding."""
    return [mj.run(tiny_model, alone, EDITS, ASKED) for alone in single(make_batch)]


def single(make_batch):
    whole = make_batch(images=IMAGES, words=WORDS)
    for row, first in enumerate((0, 2)):
        keep, tiles = whole.valid[row], slice(first, first + IMAGES[row])

        def cut(array, row=row, keep=keep):
            return array[[row]][:, keep]

        columns = ("kind", "row", "column", "tile", "last")
        at = cut(whole.image_token_index)
        yield whole.replace(
            ids=cut(whole.ids),
            position=cut(whole.position),
            tokens=tok.TokenMap(**{name: cut(getattr(whole.tokens, name)) for name in columns}),
            image_token_index=np.where(at < 0, -1, at - 4 * first),
            features=FEATURES[tiles],
            tile=whole.tile[tiles],
            is_real_tile=whole.is_real_tile[tiles],
        )


def padded(make_batch, pad):
    """With a third row, and a picture, that only fill the batch."""
    batch = make_batch(images=(*IMAGES, 0), words=(*WORDS, 3), pad=pad, length=22, fill=1)
    real = np.array([[True], [True], [False]])
    empty = dataclasses.replace(
        batch.tokens, kind=np.where(real, batch.tokens.kind, 0), last=batch.tokens.last & real
    )
    return batch.replace(tokens=empty, features=FEATURES)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_padded_batch_has_the_numbers_of_its_rows_alone(pad, tiny_model, make_batch, alone):
    together = mj.run(tiny_model, padded(make_batch, pad), EDITS, ASKED)
    for row in range(2):
        np.testing.assert_allclose(together.logits[row], alone[row].logits[0], **CLOSE)
        np.testing.assert_allclose(together["mean"][:, row], alone[row]["mean"][:, 0], **CLOSE)
    np.testing.assert_array_equal(together["mean"][:, 2], 0)
    for name in ("fire", "projector"):
        want = alone[0][name].merge(alone[1][name])
        np.testing.assert_array_equal(together[name].positive, want.positive)
        np.testing.assert_array_equal(together[name].tokens, want.tokens)
        np.testing.assert_allclose(together[name].sum, want.sum, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(together[name].max, want.max, **CLOSE)
    for ours, a, b in zip(together.receipts, *(o.receipts for o in alone), strict=True):
        np.testing.assert_array_equal(ours.tokens, a.tokens + b.tokens)
        np.testing.assert_array_equal(ours.elements, a.elements + b.elements)
        np.testing.assert_allclose(ours.norm, np.hypot(a.norm, b.norm), rtol=1e-4)
