"""Attention on each key, and maps over pictures, against the kept pattern."""

from __future__ import annotations

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions.attention_maps import picture_maps


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(images=(1, 2), words=(5, 8), pad="left")


def test_attention_is_the_mean_of_the_kept_pattern(tiny_model, batch):
    out = mj.run(tiny_model, batch, None, {
        "pattern": mj.keep(S.lm.attn.pattern),
        "seen": mj.attention(S.lm.attn.pattern, where=tok.question),
        "head": mj.attention(S.lm.attn.pattern[2, [1]], where=tok.question),
    })  # fmt: skip
    pattern, where = np.asarray(out["pattern"]), np.asarray(tok.question.mask(batch.tokens))
    for row, queries in enumerate(where):
        want = pattern[:, row][:, :, queries].mean(2)
        np.testing.assert_allclose(out["seen"][:, row], want, rtol=0, atol=1e-6)
        np.testing.assert_allclose(out["head"][row, 0], want[2, 1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(out["seen"]).sum(-1), 1, atol=1e-5)


def test_maps_put_each_token_in_its_place(tiny_model, batch):
    T, map_ = batch.ids.shape[1], batch.tokens
    values = np.arange(2 * T, dtype=np.float32).reshape(2, T)
    maps = picture_maps(values, map_, row=1)
    assert sorted(maps) == [0, 1] and all(m.shape == (2, 2, 2) for m in maps.values())
    for t in range(T):
        if map_.kind[1, t] == tok.CODE["image"]:
            tile, row, column = map_.tile[1, t], map_.row[1, t], map_.column[1, t]
            np.testing.assert_array_equal(maps[int(tile)][:, row, column], values[:, t])


def test_a_part_that_is_not_read_is_nan(batch):
    import dataclasses

    kind = np.array(batch.tokens.kind)
    first = np.flatnonzero(kind[0] == tok.CODE["image"])[0]
    kind[0, first] = tok.CODE["pad"]
    maps = picture_maps(np.ones(kind.shape[1]), dataclasses.replace(batch.tokens, kind=kind), 0)
    assert np.isnan(maps[0]).sum() == 1


def test_values_of_other_tokens_are_refused(batch):
    with pytest.raises(ValueError, match="values of 3 tokens"):
        picture_maps(np.ones(3), batch.tokens, 0)


def test_other_sites_are_refused(tiny_model, batch):
    with pytest.raises(ValueError, match=r"attention does not read lm.mlp.act"):
        mj.run(tiny_model, batch, None, {"seen": mj.attention(S.lm.mlp.act)})


def test_no_pattern_of_all_layers_exists_at_one_time(tiny_model, batch):
    """Only one layer's pattern is there at a time: memory grows by [L, B, N, S] alone."""
    from mllm_jax.interventions import binding
    from mllm_jax.passes.run import compiled_run

    def temporaries(captures):
        plain = batch.replace(processor=None)
        bound = binding.bind(tiny_model, plain, None, captures)
        text = compiled_run.lower(tiny_model, plain, *bound, logits="none", remat=False).as_text()
        return text

    L, (B, T) = tiny_model.config.lm.layers, batch.ids.shape
    N = tiny_model.config.lm.heads
    whole = f"{L}x{B}x{N}x{T}x{T}xf32"
    assert whole in temporaries({"x": mj.keep(S.lm.attn.pattern)})
    assert whole not in temporaries({"x": mj.attention(S.lm.attn.pattern)})
