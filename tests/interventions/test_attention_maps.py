"""Attention on each key, and maps over pictures, against the kept pattern."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import forms
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


def places(map_, entry):
    """Each key of an entry on a grid: its index, tile, row and column."""
    return [
        (s, int(map_.tile[entry, s]), int(map_.row[entry, s]), int(map_.column[entry, s]))
        for s in range(map_.kind.shape[1])
        if map_.kind[entry, s] == tok.CODE["image"] and map_.row[entry, s] >= 0
    ]


def assert_maps(got, pattern, queries, map_, readers):
    """Maps are the kept pattern [L, B, N, T, S] at each key, meant over queries, by a loop."""
    for row in range(len(readers)):
        maps, cells = got.maps(row), 0
        for entry in np.flatnonzero(readers[row]):
            for s, tile, down, across in places(map_, entry):
                want = pattern[:, entry][:, :, queries[entry], s].mean(-1)
                np.testing.assert_allclose(maps[tile][:, :, down, across], want, rtol=0, atol=1e-6)
                cells += 1
        assert cells == sum(np.isfinite(m[0, 0]).sum() for m in maps.values()) > 0


def test_a_map_is_the_kept_pattern_at_each_patch(tiny_model, batch):
    out = mj.run(tiny_model, batch, None, {
        "pattern": mj.keep(S.lm.attn.pattern),
        "map": mj.attention_map(S.lm.attn.pattern, to=tok.question),
        "mean": mj.attention_map(S.lm.attn.pattern[[3, 1]], to=tok.question, heads="mean"),
        "tile": mj.attention_map(S.lm.attn.pattern[2, [1]], to=tok.last, on=tok.tile(1)),
        "see": mj.keep(S.vision.attn.pattern),
        "seen": mj.attention_map(S.vision.attn.pattern, to=tok.cls),
    }, logits="none")  # fmt: skip
    pattern, map_ = np.asarray(out["pattern"]), batch.tokens
    queries = np.asarray(tok.question.mask(map_))
    assert_maps(out["map"], pattern, queries, map_, np.eye(len(map_.kind), dtype=bool))
    for tile, values in out["map"].maps(1).items():
        mean = values.mean(1)[[3, 1]]
        np.testing.assert_allclose(out["mean"].maps(1)[tile], mean, rtol=0, atol=1e-6)
    assert not out["tile"].maps(0)  # its row has one picture
    (only,) = out["tile"].maps(1)
    last = np.flatnonzero(map_.last[1])[0]
    for s, tile, down, across in places(map_, 1):
        if tile == 1:
            want = pattern[2, 1, 1, last, s]
            np.testing.assert_allclose(out["tile"].maps(1)[1][0, down, across], want, atol=1e-6)
    assert only == 1
    vision = tiny_model.token_maps(batch)["vision"]
    cls = np.asarray(vision.kind) == tok.CODE["cls"]
    assert_maps(out["seen"], np.asarray(out["see"]), cls, vision, vision.readers)


def test_a_map_of_some_patches_has_the_grid_of_the_picture(batch):
    map_ = batch.tokens
    selected = dataclasses.replace(map_, kind=np.where(map_.row == 0, map_.kind, tok.CODE["pad"]))
    values = np.arange(map_.kind.shape[1], dtype=np.float32)
    whole, some = (picture_maps(values, keys, 0)[0] for keys in (map_, selected))
    assert some.shape == whole.shape == (2, 2)
    np.testing.assert_array_equal(some[0], whole[0])
    assert np.isnan(some[1]).all()


def test_mass_by_kind_and_tile(tiny_model, batch):
    out = mj.run(tiny_model, batch, None, {
        "pattern": mj.keep(S.lm.attn.pattern),
        "kind": mj.mass(S.lm.attn.pattern, by=tok.kind, where=tok.last),
        "tile": mj.mass(S.lm.attn.pattern[1], by=tok.tile, where=tok.question, heads="mean"),
        "some": mj.mass(S.lm.attn.pattern, on=tok.text, by=["question", "image"], where=tok.last),
        "mean": mj.mass(S.lm.attn.pattern, on=tok.image, where=tok.last, heads="mean"),
        "see": mj.keep(S.vision.attn.pattern),
        "cls": mj.mass(S.vision.attn.pattern, by=("image", "cls")),
    }, logits="none")  # fmt: skip
    pattern, map_ = np.asarray(out["pattern"]), batch.tokens
    assert out["kind"].kinds == ("system", "question", "image", "newline", "answer")
    assert out["tile"].kinds == ("tile 0", "tile 1") and out["cls"].kinds == ("cls", "image")
    for row in range(len(map_.kind)):
        at = pattern[:, row][:, :, np.flatnonzero(map_.last[row])[0]]  # [L, N, S]
        for i, name in enumerate(out["kind"].kinds):
            want = at[..., map_.kind[row] == tok.CODE[name]].sum(-1)
            np.testing.assert_allclose(out["kind"].values[:, row, :, i], want, rtol=0, atol=1e-6)
            if name == "image":
                np.testing.assert_allclose(out["mean"][:, row], want.mean(-1), rtol=0, atol=1e-6)
        asked = map_.kind[row] == tok.CODE["question"]
        for tile in range(2):
            want = pattern[1, row][:, asked][..., map_.tile[row] == tile].sum(-1).mean()
            np.testing.assert_allclose(out["tile"].values[row, tile], want, rtol=0, atol=1e-6)
    some = out["some"]
    assert some.kinds == ("question", "image") and not np.asarray(some.values[..., 1]).any()
    vision = tiny_model.token_maps(batch)["vision"]
    kinds, see = np.asarray(vision.kind), np.asarray(out["see"])
    for row in range(len(map_.kind)):
        tiles = np.flatnonzero(vision.readers[row])
        want = np.mean(
            [see[:, i][..., kinds[i] == tok.CODE["image"]].sum(-1).mean(-1) for i in tiles], 0
        )
        np.testing.assert_allclose(out["cls"].values[:, row, :, 1], want, rtol=0, atol=1e-6)


def loop_of_rollout(pattern):
    """Abnar & Zuidema 2020 for one sequence [L, N, T, T], in float64: up to each layer."""
    rolled, result = np.eye(pattern.shape[-1]), []
    for layer in pattern.astype(np.float64):
        step = 0.5 * layer.mean(0) + 0.5 * np.eye(len(rolled))
        rolled = step / step.sum(-1, keepdims=True) @ rolled
        result.append(rolled)
    return np.stack(result)


def test_rollout_is_the_product_of_the_kept_patterns(tiny_model, batch):
    out = mj.run(tiny_model, batch, None, {
        "pattern": mj.keep(S.lm.attn.pattern),
        "all": mj.rollout(S.lm.attn.pattern, to=tok.last),
        "some": mj.rollout(S.lm.attn.pattern[[3, 1]], to=tok.question, on=tok.image),
        "last": mj.rollout(S.lm.attn.pattern[-1, [2]], to=tok.last),
        "see": mj.keep(S.vision.attn.pattern),
        "seen": mj.rollout(S.vision.attn.pattern[-1], to=tok.cls),
    }, logits="none")  # fmt: skip
    map_ = batch.tokens
    for row in range(len(map_.kind)):
        real = np.flatnonzero(map_.kind[row] != tok.CODE["pad"])
        inside = np.ix_(real, real)
        pattern = np.asarray(out["pattern"][:, row])[:, :, inside[0], inside[1]]
        want, last = loop_of_rollout(pattern), map_.last[row, real].argmax()
        got = np.asarray(out["all"].values)[:, row][:, real]
        np.testing.assert_allclose(got, want[:, last], rtol=0, atol=1e-6)
        np.testing.assert_allclose(got.sum(-1), 1, rtol=0, atol=1e-5)
        one = loop_of_rollout(pattern[:, [2]])[-1, last]
        np.testing.assert_allclose(out["last"].values[row, real], one, rtol=0, atol=1e-6)
        asked = map_.kind[row, real] == tok.CODE["question"]
        on = map_.kind[row, real] == tok.CODE["image"]
        want = np.where(on, want[[3, 1]][:, asked].mean(1), 0)
        np.testing.assert_allclose(out["some"].values[:, row][:, real], want, rtol=0, atol=1e-6)
    readers = tiny_model.token_maps(batch)["vision"].readers
    for entry in np.flatnonzero(np.asarray(readers).any(0)):
        want = loop_of_rollout(np.asarray(out["see"])[:, entry])[-1, 0]
        np.testing.assert_allclose(out["seen"].values[entry], want, rtol=0, atol=1e-6)


def test_a_sweep_rolls_out_from_the_first_layer(tiny_model, batch):
    captures = {"roll": mj.rollout(S.lm.attn.pattern[-1], to=tok.last, on=tok.image)}
    lanes = [mj.scale(S.lm.attn.heads[layer], 0.5) for layer in (3, 1)]
    rows = mj.sweep(rolled, tiny_model, batch, lanes, captures)
    for lane, row in zip(lanes, rows, strict=True):
        want = mj.run(tiny_model, batch, lane, captures)["roll"].values.sum(-1)
        np.testing.assert_allclose(row, want, rtol=0, atol=1e-6)


def rolled(out):
    return out["roll"].values.sum(-1)


def test_batches_are_joined_row_by_row(tiny_model, batch):
    named = {"map": mj.attention_map(S.lm.attn.pattern, heads="mean", to=tok.last)}
    part = mj.run(tiny_model, batch, None, named).captures
    joined = forms.join(named, [part, part], [batch, batch])["map"]
    rows = int(batch.valid.any(-1).sum())
    assert joined.values.shape[1] == 2 * rows
    for tile, values in joined.maps(rows + 1).items():
        np.testing.assert_array_equal(values, part["map"].maps(1)[tile])


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (lambda: mj.mass(S.lm.attn.pattern), "mass needs the option on= or by="),
        (lambda: mj.mass(S.lm.attn.pattern, by="cls"), "kinds of lm tokens are"),
        (lambda: mj.mass(S.lm.attn.pattern, on="image", heads="all"), 'heads="all" is neither'),
        (lambda: mj.attention_map(S.lm.mlp.act), "attention_map does not read lm.mlp.act"),
        (lambda: mj.attention_map(S.lm.attn.pattern, on=tok.tile(7)), "selects no key"),
        (lambda: mj.attention_map(S.lm.attn.pattern, to=tok.answer), "selects no token"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny_model, batch, capture, message):
    with pytest.raises(ValueError, match=message):
        mj.run(tiny_model, batch, None, {"x": capture()})


def test_without_pictures_there_is_no_mass_by_tile(tiny_model, make_batch):
    text = make_batch(images=(0, 0), words=(5, 8))
    with pytest.raises(ValueError, match='by="tile": this batch has no picture'):
        mj.run(tiny_model, text, None, {"m": mj.mass(S.lm.attn.pattern, by=tok.tile)})


def test_a_row_that_is_not_there_is_refused(tiny_model, batch):
    out = mj.run(tiny_model, batch, None, {"x": mj.attention_map(S.lm.attn.pattern)})
    with pytest.raises(ValueError, match="row 9 of a batch of"):
        out["x"].maps(9)
