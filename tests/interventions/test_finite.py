"""A value that is not finite is counted as it is, and named where it begins."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import finite

pytestmark = pytest.mark.usefixtures("op_by_op")

V = np.ones(32, np.float32)
V[5] = np.nan


def test_receipts_count_nan_where_it_is_selected_alone(model, batch):
    edits = (
        mj.add(S.lm.resid_post[1], V, where=tok.image)
        >> mj.scale(S.lm.resid_post[2], 2.0, where=tok.last)
        >> mj.add(S.lm.mlp.act[0, [3]], 1.0, where=tok.text)
    )
    nan, met, clean = mj.run(model, batch, edits).receipts
    image, last = (batch.tokens.kind == tok.CODE["image"]).sum(), len(batch.ids)
    text = np.isin(batch.tokens.kind, [tok.CODE["system"], tok.CODE["question"]]).sum()
    np.testing.assert_array_equal(nan.tokens, [0, image, 0])
    np.testing.assert_array_equal(nan.elements, [0, image * 32, 0])
    np.testing.assert_array_equal(np.isnan(nan.norm), [False, True, False])
    np.testing.assert_array_equal(met.elements, [0, 0, last * 32])
    np.testing.assert_array_equal(np.isnan(met.norm), [False, False, True])
    np.testing.assert_array_equal(clean.elements, [text, 0, 0])
    np.testing.assert_allclose(clean.norm, [np.sqrt(text), 0, 0], rtol=1e-5)
    assert "norm nan" in str(nan)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (mj.add(S.lm.resid_post[1], V, where=tok.image), r"lm.resid_post\[1\]"),
        (mj.scale(S.lm.mlp.act[2, [7]], np.inf), r"lm.mlp.act\[2\]"),
        (mj.replace(S.projector.out, V), r"projector.out"),
        (mj.add(S.lm.norm, V, where=tok.last), "lm.norm"),
        (mj.add(S.lm.embed, 3e38) >> mj.scale(S.lm.resid_pre[0], 1e30), r"lm.resid_pre\[0\]"),
    ],
)
def test_the_first_site_that_is_not_finite_is_named(edit, named, model, batch):
    with pytest.raises(ValueError, match=f"^{named} is the first site of this pass that is not f"):
        mj.run(model, batch, edit, check_finite=True)


def test_a_pass_that_is_finite_is_the_same_pass(model, batch):
    asked = {"x": mj.keep(S.lm.resid_post[1])}
    plain, out = (mj.run(model, batch, None, asked, check_finite=c) for c in (False, True))
    np.testing.assert_array_equal(plain.logits, out.logits)
    np.testing.assert_array_equal(plain["x"], out["x"])
    assert list(out.captures) == ["x"] and plain.finite is None
    assert out.finite["lm.resid_post"].shape == (3,) and all(ok.all() for ok in out.finite.values())
    assert mj.run(model, batch, logits="none", check_finite=True).logits is None


def test_padding_may_be_anything(model, batch):
    assert not batch.is_real_tile[-1]  # a tile that is nobody's
    features = np.array(batch.features)
    features[-1] = np.nan
    out = mj.run(model, batch.replace(features=features), check_finite=True)
    assert finite.first_not_finite(out.finite) is None


def test_what_is_not_finite_stays_in_its_row_and_kind(model, batch):
    """The means of other rows, and the entropies of other kinds, were NaN as well."""
    first = np.arange(len(batch.features)) == 0
    features = np.where(first[:, None, None], np.inf, batch.features).astype(np.float32)
    asked = {
        "mean": mj.mean(S.projector.out),
        "entropy": mj.lens(S.lm.embed, by=("system", "image")),
    }
    want, got = (
        mj.run(model, batch.replace(features=f), None, asked, logits="none").captures
        for f in (batch.features, features)
    )
    assert np.isnan(got["mean"][0]).any() and np.isnan(got["entropy"].sum[0, 1])
    np.testing.assert_allclose(got["mean"][1:], want["mean"][1:], rtol=0, atol=1e-6)
    for field in ("sum", "top"):
        ours, theirs = (np.array(getattr(part["entropy"], field)) for part in (got, want))
        ours[0, 1] = theirs[0, 1]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_under_jit_the_answer_comes_back(model, batch):
    with jax.disable_jit(False):
        run = jax.jit(
            lambda v: mj.run(model, batch, mj.add(S.lm.resid_post[1], v), check_finite=True).finite
        )
        found = run(V), run(np.ones(32, np.float32))
    assert finite.first_not_finite(found[0]) == ("lm.resid_post", 1)
    assert finite.first_not_finite(found[1]) is None


@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_generation_says_no_word_of_nan(steps, model, batch):
    edit = mj.add(S.lm.resid_post[1], V, where=tok.last if not steps else tok.answer)
    edit = mj.per_step(edit, [0.0] * steps + [1.0]) if steps else edit
    with pytest.raises(ValueError, match=f"its generated token {int(bool(steps))} are NaN"):
        mj.generate(model, batch, edit, max_new_tokens=4)


def logits_and_kept(out):
    return out.logits, out.captures


@pytest.fixture
def compiled():
    with jax.disable_jit(False):
        yield


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_sweep_names_the_edit_and_its_first_site(share, model, batch):
    edits = [mj.scale(S.lm.mlp.act[layer, [7]], by) for layer, by in ((0, 2), (2, 2), (1, np.inf))]
    asked = {"x": mj.mean(S.lm.resid_post[1])}
    with pytest.raises(
        ValueError, match=r"^lm.mlp.act\[1\] is the first site of edit 2 of the sweep that is not f"
    ):
        mj.sweep(logits_and_kept, model, batch, edits, asked, share=share, check_finite=True)
    plain, checked = (
        mj.sweep(logits_and_kept, model, batch, edits[:2], asked, share=share, check_finite=check)
        for check in (False, True)
    )
    assert list(checked[1]) == ["x"]
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(checked), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_a_sweep_that_was_checked_is_checked_again(model, batch, tmp_path):
    save = tmp_path / "rows.npz"
    edits = [mj.add(S.lm.resid_post[1], V), mj.add(S.lm.resid_post[1], 1.0)]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^lm.resid_post\[1\] is the first site of edit 0"):
            mj.sweep(logits_and_kept, model, batch, edits, check_finite=True, save=save)
    with pytest.raises(ValueError, match="settings"):
        mj.sweep(logits_and_kept, model, batch, edits, save=save)
