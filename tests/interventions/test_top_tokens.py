"""The strongest tokens of each unit, and histograms, against loops over kept values."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import top_tokens
from mllm_jax.numerics import rows

EDGES = (-1.0, -0.1, 0.0, 0.1, 1.0)


def places(batch, site):
    """Where each token is, by a loop: (example, token, tile, row, column) of the kept index."""
    found = {}
    real = np.asarray(batch.valid).any(-1)
    for b in range(len(batch.ids)):
        count = 0
        for t in range(batch.ids.shape[1]):
            if not batch.valid[b, t]:
                continue
            map_ = batch.tokens
            found[b, t] = (
                int(real[:b].sum()),
                count,
                *(int(getattr(map_, n)[b, t]) for n in ("tile", "row", "column")),
            )
            count += 1
    return found


def expected(kept, where, found, layer, unit, k, sign=1):
    tokens = [
        (-sign * float(kept[layer, b, t, unit]), example, token, tile, row, column)
        for (b, t), (example, token, tile, row, column) in found.items()
        if where[b, t]
    ]
    return sorted(tokens)[:k]


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(images=(1, 2, 0), words=(9, 5, 12), pad="left")


@pytest.mark.parametrize(("largest", "row_by_row"), [(True, False), (False, False), (True, True)])
def test_top_is_a_loop_over_kept_values(tiny_model, batch, monkeypatch, largest, row_by_row):
    site, sign = S.lm.mlp.act, 1 if largest else -1
    k = 6 if row_by_row else 7  # another program
    if row_by_row:
        monkeypatch.setattr(rows, "MAX_ELEMENTS_AT_ONCE", 0)
    out = mj.run(tiny_model, batch, None, {
        "x": mj.keep(site, where=tok.image), "top": (mj.top if largest else mj.bottom)(site, k=k, where=tok.image),
    })  # fmt: skip
    top, kept = out["top"], np.asarray(out["x"])
    where, found = np.asarray(tok.image.mask(batch.tokens)), places(batch, site)
    for layer in range(len(kept)):
        for unit in range(0, kept.shape[-1], 5):
            want = expected(kept, where, found, layer, unit, k, sign)
            got = zip(
                *(
                    np.asarray(getattr(top, n)[layer, unit]).tolist()
                    for n in ("value", "example", "token", "tile", "row", "column")
                )
            )
            got = [(-sign * v, *rest) for v, *rest in got]
            assert [rest for _, *rest in got] == [rest for _, *rest in want]
            np.testing.assert_allclose([v for v, *_ in got], [v for v, *_ in want], rtol=1e-6)


def test_fewer_tokens_than_k(tiny_model, make_batch):
    batch = make_batch(images=(0, 0), words=(3, 2))
    top = mj.run(tiny_model, batch, None, {"top": mj.top(S.lm.mlp.act, k=99, where=tok.last)})[
        "top"
    ]
    assert (np.asarray(top.example[..., :2]) >= 0).all() and (
        np.asarray(top.example[..., 2:]) == -1
    ).all()
    assert np.isnan(np.asarray(top.value[..., 2:])).all()


def test_ties_go_to_the_earlier_token(tiny_model, make_batch):
    batch = make_batch(images=(0, 0), words=(4, 3))
    edit = mj.replace(S.lm.mlp.act[1], 2.5)
    top = mj.run(tiny_model, batch, edit, {"top": mj.top(S.lm.mlp.act[1], k=6)})["top"]
    assert np.unique(np.asarray(top.example), axis=0).tolist() == [[0, 0, 0, 0, 1, 1]]
    assert np.unique(np.asarray(top.token), axis=0).tolist() == [[0, 1, 2, 3, 0, 1]]


def put(x, value):
    """The first token of each row has another value in every unit."""
    return x.at[:, 0].set(value[0, 0, 0])


@pytest.fixture(scope="module")
def with_odd_values(tiny_model, make_batch):
    """Return a function: a value, captures -> their results where each first token has it."""
    batch = make_batch(images=(0, 0), words=(4, 3))

    def run(value, captures):
        odd = mj.call(S.lm.mlp.act[1], put, value=np.full((1, 1, 1, 1), value, np.float32))
        named = {name: make(S.lm.mlp.act[1], **how) for name, (make, how) in captures.items()}
        return mj.run(tiny_model, batch, odd, named, logits="none")

    return run


ODD = {
    "top": (mj.top, {"k": 3}), "bottom": (mj.bottom, {"k": 3}),
    "bins": (mj.histogram, {"edges": [0.0, 9.0]}), "some": (mj.sample, {"k": 7, "edges": [9.0]}),
}  # fmt: skip


def test_what_is_not_a_number_is_seen_and_is_in_no_bin(with_odd_values):
    out = with_odd_values(np.nan, ODD)
    for name in ("top", "bottom"):
        assert np.isnan(out[name].value[:, :2]).all() and np.isfinite(out[name].value[:, 2]).all()
        assert (np.asarray(out[name].example)[:, :2] == [0, 1]).all()
    counts = np.asarray(out["bins"].counts)
    assert (np.asarray(out["bins"].nan) == 2).all()
    assert (counts.sum(-1) == 5).all() and not counts[:, 2].any()
    assert not (np.asarray(out["some"].token)[:, :, :3] == 0).any()
    a, b = (out["top"].wide() for _ in range(2))
    merged = a.merge(b)
    assert np.isnan(merged.value).all() and (merged.example == [0, 1, 2]).all()


@pytest.mark.parametrize("value, first, bin_", [(np.inf, "top", 1), (-np.inf, "bottom", 0)])
def test_infinite_values_are_tokens(with_odd_values, value, first, bin_):
    """One is the strongest, or the last of all, and lies in the outer bin."""
    out = with_odd_values(
        value, ODD | {"all": (mj.top if first == "bottom" else mj.bottom, {"k": 7})}
    )
    assert (np.asarray(out[first].value)[:, :2] == value).all()
    assert (np.asarray(out["all"].example)[:, -2:] == [0, 1]).all()
    assert (np.asarray(out["some"].token)[:, bin_] == 0).sum() == 2 * len(out["some"].token)
    assert (np.asarray(out["bins"].counts)[:, 2 * bin_] >= 2).all()


def test_zeros_of_both_signs_are_ties(tiny_model, make_batch):
    """In one batch and in several: a scale of 0 makes both."""
    batches = [make_batch(images=(0, 0), words=(4, 3), seed=s) for s in range(2)]
    captures = {"top": mj.top(S.lm.mlp.act[1], k=2), "low": mj.bottom(S.lm.mlp.act[1], k=2)}
    found = mj.reduce(captures, tiny_model, batches, mj.scale(S.lm.mlp.act[1], 0.0))
    for top in found.values():
        assert np.signbit(top.value).any() and not np.signbit(top.value).all()
        assert (top.example == 0).all() and (top.token == [0, 1]).all()


def test_merging_is_associative_and_is_one_batch(tiny_model, make_batch, tmp_path):
    """In parts, resumed and in one batch the same tokens; only rounding may differ."""
    batches = [
        make_batch(images=(1, 0), words=w, seed=i) for i, w in enumerate(((5, 7), (7, 3), (2, 7)))
    ]
    captures = {"top": mj.top(S.lm.resid_post, k=4), "low": mj.bottom(S.lm.mlp.act[1:3], k=3),
                "bins": mj.histogram(S.lm.mlp.act, edges=EDGES, by=tok.kind), "some": mj.sample(S.lm.mlp.act, k=2, edges=EDGES)}  # fmt: skip
    whole = mj.reduce(captures, tiny_model, batches)
    parts = [mj.run(tiny_model, b, None, captures, logits="none") for b in batches]
    for name in captures:
        a, b, c = (part[name].wide() for part in parts)
        for merged in (a.merge(b).merge(c), a.merge(b.merge(c))):
            for one, two in zip(
                *map(functools.partial(dataclasses.astuple), (merged, whole[name]))
            ):
                np.testing.assert_array_equal(one, two)
    mj.reduce(captures, tiny_model, batches[:2], save=tmp_path / "s.npz", every=1)
    resumed = mj.reduce(captures, tiny_model, batches, save=tmp_path / "s.npz", every=1)
    for name in captures:
        for one, two in zip(*map(dataclasses.astuple, (resumed[name], whole[name]))):
            np.testing.assert_array_equal(one, two)
    assert int(whole["top"].examples) == 6 and set(np.unique(whole["top"].example)) <= set(range(6))


def found(out):
    return [getattr(out["top"], n) for n in ("value", "example", "token", "tile", "row", "column")]


def test_places_in_passes_of_some_tokens(tiny_model, make_batch):
    """In a sweep whose lanes share the first tokens, and of the logits of the last token alone."""
    batch = make_batch(images=(1, 0), words=(20, 23), pad="left")
    captures = {"top": mj.top(S.lm.mlp.act[1:], k=2, where=tok.last)}
    lanes = [mj.scale(S.lm.mlp.act[1], by, where=tok.last) for by in (1.0, -2.0)]
    rows = mj.sweep(found, tiny_model, batch, lanes, captures)
    for lane, edits in enumerate(lanes):
        want = found(mj.run(tiny_model, batch, edits, captures))
        for got, one in zip(rows, want, strict=True):
            np.testing.assert_allclose(got[lane], one, rtol=0, atol=1e-5)
    assert (want[2] == 23).any() and (want[2] == 22).any()
    captures = {"top": mj.top(S.logits, k=2, where=tok.last)}
    last, whole = (
        found(mj.run(tiny_model, batch, None, captures, logits=l)) for l in ("last", "all")
    )
    for got, one in zip(last, whole, strict=True):
        np.testing.assert_allclose(got, one, rtol=0, atol=1e-5)


def test_histogram_is_a_loop(tiny_model, batch):
    site = S.lm.mlp.act
    out = mj.run(tiny_model, batch, None, {
        "x": mj.keep(site), "bins": mj.histogram(site, edges=EDGES, by=("image", "question")),
    })  # fmt: skip
    kept, kind = np.asarray(out["x"], np.float32), np.asarray(batch.tokens.kind)
    for n, name in enumerate(out["bins"].kinds):
        values = kept[:, kind == tok.CODE[name]]
        want = np.stack([np.bincount(np.digitize(values[l, :, f], np.float32(EDGES)), minlength=6)
                         for l in range(len(kept)) for f in range(kept.shape[-1])])  # fmt: skip
        np.testing.assert_array_equal(
            np.asarray(out["bins"].counts)[..., n].reshape(want.shape), want
        )
    assert out["bins"].kinds == ("question", "image")


def test_a_sample_lies_in_its_bin_and_holds_every_token_of_a_small_one(tiny_model, batch):
    site, k = S.lm.mlp.act, 3
    captures = {"bins": mj.histogram(site, edges=EDGES), "some": mj.sample(site, k=k, edges=EDGES)}
    out = mj.run(tiny_model, batch, None, captures)
    some, counts = out["some"], np.asarray(out["bins"].counts)
    value = np.asarray(some.value)
    np.testing.assert_array_equal((np.asarray(some.example) >= 0).sum(-1), np.minimum(counts, k))
    bin_of = np.digitize(value, np.float32(EDGES))
    numbers = np.broadcast_to(np.arange(6)[:, None], value.shape)
    assert (bin_of == numbers)[~np.isnan(value)].all()


def test_tiles_count_for_the_first_row_that_reads_them(tiny_model, make_batch):
    batch = make_batch(images=(2, 1), words=(5, 4))
    out = mj.run(tiny_model, batch, None, {"x": mj.keep(S.vision.mlp.act, where=tok.image),
                                          "top": mj.top(S.vision.mlp.act, k=2, where=tok.image)})  # fmt: skip
    kept, top = np.asarray(out["x"]), out["top"]
    readers = np.asarray(tiny_model.config.readers(batch))
    for unit in range(0, kept.shape[-1], 7):
        flat = np.where(
            np.asarray(tok.image.mask(tiny_model.token_maps(batch)["vision"])),
            kept[1, ..., unit],
            -np.inf,
        )
        tile, patch = np.unravel_index(flat.argmax(), flat.shape)
        got = [int(np.asarray(getattr(top, n))[1, unit, 0]) for n in ("example", "token", "tile")]
        assert got == [readers[:, tile].argmax(), patch, batch.tile[tile]]


@pytest.mark.parametrize("make, match", [
    (lambda: mj.top(S.lm.mlp.act, k=0), "top k=0"),
    (lambda: mj.histogram(S.lm.mlp.act, edges=(1, 0)), "increasing"),
    (lambda: mj.sample(S.lm.mlp.act, edges=()), "increasing"),
    (lambda: mj.histogram(S.lm.mlp.act, edges=[np.nan]), "increasing"),
])  # fmt: skip
def test_wrong_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_site_without_one_value_for_each_unit(tiny_model, batch):
    with pytest.raises(ValueError, match="top does not read lm.attn.heads"):
        mj.run(tiny_model, batch, None, {"t": mj.top(S.lm.attn.heads)})


def test_the_hash_is_the_same_on_host_and_device():
    value, token = np.float32([0.5, -1.25, 3e-9, 0]), np.int32([0, 7, 100000, 3])
    import jax.numpy as jnp

    ours = [top_tokens._strength(value, token, "random", xp) for xp in (np, jnp)]
    np.testing.assert_array_equal(*ours)
