"""Captures of a generation are those of `run` on the whole text, row by row."""

from __future__ import annotations

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok

N = 6
CAPTURES = {
    "x": mj.keep(S.lm.resid_post),
    "mean": mj.mean(S.lm.mlp.act, where=tok.answer),
    "fire": mj.stats(S.lm.mlp.act, by=tok.kind),
    "lens": mj.lens(S.lm.resid_post[1:], k=2, where=tok.generating),
    "mass": mj.mass(S.lm.attn.pattern, on=tok.image, where=tok.answer),
    "logits": mj.keep(S.logits, where=tok.generating),
    "top": mj.top(S.lm.mlp.act, k=3, where=tok.answer),
}
EDITS = mj.add(S.lm.resid_post[1], 0.3, where=tok.generating) >> mj.ablate(
    S.lm.mlp.act[0, :9], where=tok.image
)


@pytest.fixture(scope="module", params=["left", "right"])
def batch(make_batch, request):
    return make_batch(images=(1, 2, 1), words=(9, 5, 12), pad=request.param)


@pytest.mark.parametrize(
    "edits", [pytest.param(None, marks=pytest.mark.slow), EDITS], ids=["clean", "edited"]
)
def test_against_run_on_the_whole_text(tiny_model, make_batch, batch, edits):
    out = mj.generate(tiny_model, batch, edits, CAPTURES, max_new_tokens=N)
    plain = mj.generate(tiny_model, batch, edits, max_new_tokens=N)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    T, read = batch.ids.shape[1], N - 1
    assert out.batch.ids.shape[1] == T + read
    for row in range(len(batch.ids)):
        # The row by itself, without padding, from its ids: what a user would write by hand.
        columns = np.flatnonzero(np.asarray(out.batch.valid[row]))
        alone = _alone(out.batch, row, columns)
        want = mj.run(tiny_model, alone, edits, CAPTURES, logits="all")
        np.testing.assert_allclose(out["x"][:, row, columns], want["x"][:, 0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            out["logits"][row, columns], want["logits"][0], rtol=0, atol=1e-4
        )
        for name in ("mean", "mass"):
            np.testing.assert_allclose(out[name][:, row], want[name][:, 0], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(out["lens"].ids[:, row, columns], want["lens"].ids[:, 0])
        # The words that the lens of the last layer reads are those that were said.
        said = np.asarray(want["logits"][0])[
            np.flatnonzero(np.asarray(tok.generating.mask(alone.tokens))[0])
        ]
        np.testing.assert_array_equal(said.argmax(-1), out.tokens[row])
    answers = out["fire"].kinds.index("answer")
    assert (
        np.asarray(out["fire"].tokens)[..., answers].tolist()
        == [3 * read] * tiny_model.config.lm.layers
    )


def _alone(batch, row, columns):
    """One row of a batch without padding, with the tiles of all."""

    def take(a):
        return np.asarray(a)[row : row + 1, columns]

    map_ = tok.TokenMap(
        *(take(getattr(batch.tokens, n)) for n in ("kind", "row", "column", "tile", "last"))
    )
    return batch.replace(ids=take(batch.ids), position=take(batch.position), tokens=map_,
                         image_token_index=take(batch.image_token_index), processor=None)  # fmt: skip


def test_rows_that_have_ended_do_not_count(tiny_model, make_batch, monkeypatch):
    batch = make_batch(images=(1, 1), words=(6, 6))
    said = np.asarray(mj.generate(tiny_model, batch, max_new_tokens=N).tokens)

    class Processor:
        stop_ids = said[0, 2:3]

        def text(self, tokens, stop):
            return [""] * len(tokens)

    stopped = mj.generate(tiny_model, batch.replace(processor=Processor()), None,
                          {"fire": mj.stats(S.lm.mlp.act, by=("answer",))}, max_new_tokens=N, stop=True)  # fmt: skip
    at = [int(np.append(np.flatnonzero(row == said[0, 2]), N)[0]) for row in said]
    read = [min(n, N - 1) for n in at]
    assert read[0] == 2
    assert np.asarray(stopped["fire"].tokens).max() == sum(read)
    np.testing.assert_array_equal(
        np.asarray(stopped.batch.valid)[:, batch.ids.shape[1] :].sum(-1), read
    )


def test_one_token_reads_the_prompt_alone(tiny_model, batch):
    out = mj.generate(tiny_model, batch, None, {"x": mj.keep(S.lm.resid_post[0])}, max_new_tokens=1)
    want = mj.run(tiny_model, batch, None, {"x": mj.keep(S.lm.resid_post[0])})["x"]
    np.testing.assert_allclose(out["x"], want, rtol=0, atol=1e-6)


def test_an_unknown_name_lists_the_captures(tiny_model, batch):
    with pytest.raises(KeyError, match="this generation has: none"):
        mj.generate(tiny_model, batch, max_new_tokens=1)["x"]
