"""Captures are NumPy on what a plain loop over layers has seen; padding never counts."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import binding, captures
from tests.helpers import oracle

pytestmark = pytest.mark.usefixtures("op_by_op")

KINDS = ("system", "question", "image", "newline", "answer")  # of the LM
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def batch(mixed):
    return mixed


@pytest.fixture(scope="module")
def seen(model, batch, op_by_op):
    """[L, B, T, ...] by site."""
    found = oracle.forward(model, batch)[1]
    return {name: np.stack(layers) for name, layers in found.items()}


def read(model, batch, **asked):
    return mj.run(model, batch, None, asked, logits="all").captures


def tokens_of(site, batch):
    """bool[B, T] of real tokens, by hand."""
    if site.module in ("lm", "logits"):
        return batch.tokens.kind != tok.CODE["pad"]
    return np.repeat(batch.is_real_tile[:, None], 17 if site.module == "vision" else 4, 1)


def laid(site, mask):
    """[B, T] along the axes of a site."""
    shape = iter(mask.shape)
    return mask.reshape([next(shape) if a in "BITP" else 1 for a in site.axes])


def test_keep_brings_back_every_site(model, batch, seen):
    found = read(model, batch, **{site.name: mj.keep(site) for site in oracle.SITES})
    assert set(found) == set(seen) == {site.name for site in oracle.SITES}
    for site in oracle.SITES:
        want = np.where(laid(site, tokens_of(site, batch)), seen[site.name], 0)
        want = want if site.stacked else want[0]
        np.testing.assert_allclose(found[site.name], want, err_msg=site.name, **CLOSE)


@pytest.mark.parametrize("where", [None, tok.image, tok.last | tok.row(1)])
def test_keep_of_layers_units_and_tokens(where, model, batch, seen):
    act, heads = S.lm.mlp.act, S.lm.attn.heads
    asked = {
        "one": act[2],
        "last": act[-1],
        "list": act[[2, 0]],
        "twice": act[[1, 2, 1]],
        "range": act[1:3],
        "mask": act[np.array([True, False, True])],
        "units": act[2, [5, 3]],
        "unit": act[:, 7],
        "heads": heads[1:, [3, 0]],
    }
    found = read(model, batch, **{n: mj.keep(at, where=where) for n, at in asked.items()})
    x, h = seen["lm.mlp.act"], seen["lm.attn.heads"]
    want = {
        "one": x[2], "last": x[2], "list": x[[2, 0]], "twice": x[[1, 2, 1]], "range": x[1:3], "mask": x[[0, 2]],
        "units": x[2][..., [5, 3]], "unit": x[..., [7]], "heads": h[1:][..., [3, 0], :],
    }  # fmt: skip
    mask = tok.of(where).mask(batch.tokens)
    for name, value in want.items():
        units = 2 if name == "heads" else 1  # axes after the tokens
        chosen = mask.reshape(*mask.shape, *(1,) * units)
        np.testing.assert_allclose(found[name], np.where(chosen, value, 0), err_msg=name, **CLOSE)


def test_mean_is_over_the_selected_tokens_of_each_row(model, batch, seen):
    found = read(
        model, batch,
        all=mj.mean(S.lm.resid_post), words=mj.mean(S.lm.resid_post[2], where=tok.text),
        heads=mj.mean(S.lm.attn.heads[[1]], where=tok.last),
    )  # fmt: skip
    kind = batch.tokens.kind
    x = seen["lm.resid_post"]
    for row in range(8):
        real, words = kind[row] > 0, (kind[row] > 0) & (kind[row] != tok.CODE["image"])
        np.testing.assert_allclose(found["all"][:, row], x[:, row][:, real].mean(1), **CLOSE)
        np.testing.assert_allclose(found["words"][row], x[2, row][words].mean(0), **CLOSE)
        last = seen["lm.attn.heads"][1, row, batch.tokens.last[row]][0]
        np.testing.assert_allclose(found["heads"][0, row], last, **CLOSE)


@pytest.mark.parametrize(
    "capture",
    [
        mj.mean(S.lm.resid_post, where=tok.image),
        mj.mean(S.vision.resid_post),
        mj.mass(S.lm.attn.pattern, on=tok.text, where=tok.image),
    ],
)
def test_a_row_without_a_token_has_no_mean(capture, model, batch):
    message = f"{capture.form} of .* selects no token of row 1, so that row has no {capture.form}"
    with pytest.raises(ValueError, match=message):
        read(model, batch, x=capture)


def test_mass_is_what_queries_put_on_keys(model, batch, seen):
    found = read(
        model, batch,
        all=mj.mass(S.lm.attn.pattern, on=tok.image),
        some=mj.mass(S.lm.attn.pattern[2, [3, 1]], on=tok.image, where=tok.last),
        one=mj.mass(S.lm.attn.pattern, on=tok.every),
    )  # fmt: skip
    pattern, image = seen["lm.attn.pattern"], batch.tokens.kind == tok.CODE["image"]
    on = (pattern * image[:, None, None]).sum(-1)  # [L, B, N, T]
    for row in range(8):
        real, last = batch.valid[row], batch.tokens.last[row]
        np.testing.assert_allclose(found["all"][:, row], on[:, row][..., real].mean(-1), **CLOSE)
        want = on[2, row][[3, 1]][:, last][:, 0]
        np.testing.assert_allclose(found["some"][row], want, **CLOSE)
    np.testing.assert_allclose(found["one"], np.ones((3, 8, 4)), **CLOSE)


def numpy_stats(x, masks):
    """Of x [L, B, T, F] and masks [kinds, B, T]: fields of Stats, kinds last."""
    picked = [x[:, mask] for mask in masks]  # [L, n, F]
    return {
        "positive": np.stack([(p > 0).sum(1) for p in picked], -1),
        "sum": np.stack([p.sum(1) for p in picked], -1),
        "squares": np.stack([(p**2).sum(1) for p in picked], -1),
        "max": np.stack([p.max(1, initial=-np.inf) for p in picked], -1),
        "tokens": np.stack([np.full(len(x), p.shape[1]) for p in picked], -1),
    }


def assert_stats(found, want):
    np.testing.assert_array_equal(found.positive, want["positive"])
    np.testing.assert_array_equal(found.tokens, want["tokens"])
    for name in ("sum", "squares", "max"):
        np.testing.assert_allclose(getattr(found, name), want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", [S.lm.mlp.act, S.lm.resid_post, S.vision.mlp.act, S.projector.act],
                         ids=str)  # fmt: skip
def test_stats_by_kind(site, model, batch, seen):
    kinds = captures.TOKEN_KINDS[site.module]
    kind = batch.tokens.kind
    if site.module != "lm":
        kind = np.full((9, 17 if site.module == "vision" else 4), tok.CODE["image"])
        kind[:, : site.module == "vision"] = tok.CODE["cls"]
        kind[~batch.is_real_tile] = tok.CODE["pad"]
    masks = np.stack([kind == tok.CODE[k] for k in kinds])
    found = read(model, batch, x=mj.stats(site, by=tok.kind))["x"]
    assert found.kinds == kinds and found.positive.dtype == np.int32
    assert_stats(found, numpy_stats(seen[site.name], masks))
    assert (np.asarray(found.max)[..., ~masks.any((1, 2))] == -np.inf).all()

    whole = read(model, batch, x=mj.stats(site))["x"]
    total = {n: v[..., 0] for n, v in numpy_stats(seen[site.name], masks.any(0)[None]).items()}
    assert whole.kinds == ()
    assert_stats(whole, total)


def test_stats_of_layers_units_and_tokens(model, batch, seen):
    found = read(
        model, batch,
        one=mj.stats(S.lm.mlp.act[2, [7, 1]], by=("image", "question")),
        heads=mj.stats(S.lm.attn.heads[1:, [2]], where=tok.last),
        once=mj.stats(S.lm.embed, by="image"),
    )  # fmt: skip
    question, image = (batch.tokens.kind == tok.CODE[k] for k in ("question", "image"))
    want = numpy_stats(seen["lm.mlp.act"][2:3][..., [7, 1]], [question, image])
    assert found["one"].kinds == ("question", "image")
    assert_stats(found["one"], {name: value[0] for name, value in want.items()})
    want = numpy_stats(seen["lm.attn.heads"][1:, :, :, 2], [batch.tokens.last])
    positive = np.asarray(found["heads"].positive)[:, 0]
    np.testing.assert_array_equal(positive, want["positive"][..., 0])
    want = numpy_stats(seen["lm.embed"], [image])
    assert_stats(found["once"], {name: value[0] for name, value in want.items()})


def test_merging_is_exact_in_any_order(model, batch, pictures):
    asked = {"x": mj.stats(S.lm.mlp.act, by=tok.kind)}
    a, b = (mj.run(model, x, None, asked)["x"].wide() for x in (batch, pictures))
    ab, ba = a.merge(b), b.merge(a)
    assert ab.positive.dtype == ab.tokens.dtype == np.int64 and ab.sum.dtype == np.float64
    for name in ("positive", "tokens", "sum", "max"):
        np.testing.assert_array_equal(getattr(ab, name), getattr(ba, name))


def test_a_layer_of_a_capture_may_be_traced(model, batch, seen):
    bound = binding.bind(model, batch, None, {"x": mj.keep(S.lm.resid_post[2])})[1]["x"]
    traced = jax.eval_shape(  # the shapes are known, the layer is not
        lambda at: binding.bind(model, batch, None, {"x": mj.keep(S.lm.resid_post[at])})[1]["x"], 2
    )
    assert jax.tree.structure(traced) == jax.tree.structure(bound)
    assert traced.slots.shape == bound.slots.shape


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mj.keep(S.lm.mlp.act[3]), ValueError, "lm.mlp.act: layer 3 is out of range"),
        (lambda: mj.keep(S.lm.mlp.act[0, 48]), ValueError, "lm.mlp.act: unit 48 is out of range"),
        (lambda: mj.keep(S.lm.mlp.act[9:]), ValueError, "capture of lm.mlp.act selects no layer"),
        (lambda: mj.keep(S.lm.mlp.act[np.ones((3, 48), bool)]), ValueError,
         "lm.mlp.act: unit: a capture takes the same units in every layer"),
        (lambda: mj.keep(S.lm.akt), AttributeError, "unknown site 'lm.akt'; nearest: .*lm.mlp.act"),
        (lambda: mj.stats(S.lm.attn.pattern), ValueError, "stats does not read lm.attn.pattern"),
        (lambda: mj.mass(S.lm.resid_post, on=tok.image), ValueError,
         "mass does not read lm.resid_post; mass reads lm.attn.pattern"),
        (lambda: mj.lens(S.lm.mlp.act), ValueError,
         r"a lens reads tensors of the LM's width D; lm.mlp.act is \[B T F\]"),
        (lambda: mj.lens(S.vision.resid_post), ValueError, "width D; vision.resid_post is .I P E."),
        (lambda: mj.lens(S.lm.resid_post[1, :5]), ValueError, "a lens reads all units of lm.resid"),
        (lambda: mj.lens(S.lm.norm), ValueError, "lm.norm is already normalised"),
        (lambda: mj.lens(S.lm.resid_post, k=97), ValueError,
         "lens k=97 of lm.resid_post: the vocabulary has 96 words"),
        (lambda: mj.lens(S.lm.resid_post, k=0), ValueError, "lens k=0 is not a whole number from 1"),
        (lambda: mj.stats(S.lm.attn.mask), ValueError,
         r"stats does not read lm.attn.mask, which is \[B N T S\]; mass reads"),
        (lambda: mj.mean(S.lm.attn.mask), ValueError, "mean does not read lm.attn.mask"),
        (lambda: mj.mean(S.lm.attn.pattern), ValueError, "mean does not read lm.attn.pattern"),
        (lambda: mj.mass(S.lm.attn.mask, on=tok.image), ValueError, "mass does not read lm.attn.m"),
        (lambda: mj.keep(S.lm.mlp.act[[]]), ValueError, "lm.mlp.act selects no layer"),
        (lambda: mj.keep(S.lm.mlp.act[0, []]), ValueError, "lm.mlp.act selects no unit"),
        *((lambda make=make: make(S.lm.resid_post, where=tok.answer), ValueError,
           "of lm.resid_post selects no token of this batch .see where=")
          for make in (mj.keep, mj.mean, mj.stats, mj.lens)),
        (lambda: mj.mass(S.lm.attn.pattern, on=tok.answer), ValueError,
         "selects no key of this batch .see on="),
        (lambda: mj.stats(S.lm.mlp.act, by="imgae"), ValueError,
         "by=imgae: kinds of lm tokens are system, question, image"),
        *((lambda by=by: mj.stats(S.lm.mlp.act, by=by), ValueError, "by is of type .*, expected tok")
          for by in (3, tok.image, [tok.image])),
        *((lambda edges=edges: mj.histogram(S.lm.mlp.act, edges=edges), ValueError,
           "the edges of bins must be increasing numbers") for edges in ("abc", [1j, 2j], {}, 5)),
        (lambda: mj.stats(S.lm.mlp.act, by=("cls",)), ValueError, "by=cls: kinds of lm tokens are"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(make, error, message, model, batch):
    with pytest.raises(error, match=message) as caught:
        mj.run(model, batch, None, {"x": make()})
    assert "\n" not in str(caught.value)


def test_an_unknown_capture(model, batch):
    out = mj.run(model, batch, None, {"x": mj.mean(S.lm.embed)})
    with pytest.raises(KeyError, match="no capture 'y'; this pass has: x"):
        out["y"]
