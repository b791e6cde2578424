"""Sums over batches are exact, and do not know whether they were interrupted."""

from __future__ import annotations

import importlib
import operator

import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok

reduce_ = importlib.import_module("mllm_jax.passes.reduce")
ASKED = {
    "fire": mj.stats(S.lm.mlp.act, by=tok.kind),
    "once": mj.stats(S.lm.embed),
    "lens": mj.lens(S.lm.resid_post[1:], by=tok.kind),
}
ROWS = {"images": (0, 0), "words": (9, 6)}


@pytest.fixture(scope="module")
def batches(make_batch):
    return [make_batch(**ROWS, seed=seed) for seed in range(5)]


@pytest.fixture(scope="module")
def total(tiny_model, batches):
    return mj.reduce(ASKED, tiny_model, batches)


def test_equals_one_pass_over_all(tiny_model, make_batch, batches, total):
    joined = make_batch(images=(0,) * 10, words=ROWS["words"] * 5)
    for name in ("ids", "position", "image_token_index"):
        getattr(joined, name)[:] = np.concatenate([getattr(b, name) for b in batches])
    once = mj.run(tiny_model, joined, None, ASKED, logits="none")
    for name in ("fire", "once"):
        assert total[name].positive.dtype == total[name].tokens.dtype == np.int64
        np.testing.assert_array_equal(total[name].positive, once[name].positive)
        np.testing.assert_array_equal(total[name].tokens, once[name].tokens)
        np.testing.assert_allclose(total[name].sum, once[name].sum, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(total[name].max, once[name].max, rtol=0, atol=1e-5)
    assert total["fire"].tokens.sum() == 5 * 15 * 4 and (total["fire"].positive > 0).any()
    for name in ("sum", "top"):
        want = np.asarray(getattr(once["lens"], name)).sum(1)
        np.testing.assert_allclose(getattr(total["lens"], name), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(total["lens"].tokens, once["lens"].tokens.sum(1))


def test_the_sums_do_not_grow_with_the_rows(tiny_model, batches, total, tmp_path):
    one = mj.reduce(ASKED, tiny_model, batches[:1])
    for name, value in total.items():
        for field in vars(value):
            assert np.shape(getattr(value, field)) == np.shape(getattr(one[name], field))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("after", [1, 3])
def test_killed_and_restarted_it_ends_with_the_same_bytes(
    after, lazy, tiny_model, batches, total, passes, tmp_path
):
    save = tmp_path / "sums.npz"
    uninterrupted = tmp_path / "other.npz"
    mj.reduce(ASKED, tiny_model, batches, save=uninterrupted)

    def some():
        yield from batches[:after]
        raise Killed

    with pytest.raises(Killed):
        mj.reduce(ASKED, tiny_model, some(), save=save, every=1)
    again = mj.reduce(ASKED, tiny_model, iter(batches) if lazy else Counted(batches), save=save)
    assert save.read_bytes() == uninterrupted.read_bytes()
    assert len(passes) == 5 + 5 and all(map(operator.is_, passes[5:], batches))
    for name, value in total.items():
        assert again[name].kinds == value.kinds and type(again[name]) is type(value)
        for field in vars(value):
            np.testing.assert_array_equal(getattr(again[name], field), getattr(value, field))
    mj.reduce(ASKED, tiny_model, iter(batches) if lazy else Counted(batches), save=save)
    assert len(passes) == 10  # nothing is run for what is done


def test_names_of_captures_may_hold_slashes(total):
    named = {"a": total[next(iter(total))]} | {f"a/{name}": value for name, value in total.items()}
    again = reduce_._unflatten(reduce_._flatten(named))
    assert again.keys() == named.keys()
    for name, value in named.items():
        assert type(again[name]) is type(value)
        for field in vars(value):
            np.testing.assert_array_equal(getattr(again[name], field), getattr(value, field))


@pytest.fixture
def passes(monkeypatch):
    """The batches that passes are run over."""
    counts = []

    def counted(model, batch, *args, run=reduce_.run, **how):
        counts.append(batch)
        return run(model, batch, *args, **how)

    monkeypatch.setattr(reduce_, "run", counted)
    return counts


class Counted:
    """A sequence that says how long it is and nothing else."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        assert 0 <= i < len(self)
        return self.batches[i]


def test_edits_are_in_the_sums(tiny_model, batches):
    edits = mj.ablate(S.lm.mlp.act[2])
    asked = {"fire": mj.stats(S.lm.mlp.act)}
    found = mj.reduce(asked, tiny_model, batches[:2], edits)["fire"]
    assert not found.positive[2].any() and found.positive[1].any() and found.tokens[2] == 30


@pytest.mark.parametrize(
    ("asked", "edits", "differs"),
    [
        ({"fire": mj.stats(S.lm.mlp.act, by=tok.kind)}, mj.ablate(S.lm.mlp.act[1]), "edits"),
        ({"fire": mj.stats(S.lm.mlp.act, by=tok.kind, where=tok.text)}, None, r"captures \(fire"),
        ({"fire": mj.stats(S.lm.mlp.gated, by=tok.kind)}, None, r"captures \(fire"),
        ({"other": mj.stats(S.lm.mlp.act, by=tok.kind)}, None, r"captures \(fire, other"),
    ],
)
def test_sums_of_something_else_are_refused(asked, edits, differs, tiny_model, batches, tmp_path):
    save = tmp_path / "sums.npz"
    mj.reduce({"fire": mj.stats(S.lm.mlp.act, by=tok.kind)}, tiny_model, batches[:1], save=save)
    before = save.read_bytes()
    message = f"sums.npz was made for something else: it differs in {differs}"
    with pytest.raises(ValueError, match=message):
        mj.reduce(asked, tiny_model, batches[:1], edits, save=save)
    assert save.read_bytes() == before


@pytest.fixture
def kept(tiny_model, batches, tmp_path):
    """Sums of the first two batches, and where they are."""
    total = mj.reduce(FIRE, tiny_model, batches[:2], save=tmp_path / "sums.npz")["fire"]
    return total, tmp_path / "sums.npz"


FIRE = {"fire": mj.stats(S.lm.mlp.act)}


@pytest.mark.parametrize("lazy", [False, True])
def test_other_or_fewer_batches_are_refused(lazy, tiny_model, batches, kept):
    _, save = kept
    before = save.read_bytes()
    form = iter if lazy else list
    other = [batches[0], batches[2]]
    with pytest.raises(
        ValueError, match=r"differs in data \(what the first 2 were\); give another"
    ):
        mj.reduce(FIRE, tiny_model, form(other), save=save)
    with pytest.raises(ValueError, match=r"contains 2, but only 1 are requested"):
        mj.reduce(FIRE, tiny_model, form(batches[:1]), save=save)
    assert save.read_bytes() == before
    start_over = mj.reduce(FIRE, tiny_model, form(other), save=save, restart=True)["fire"]
    want = mj.reduce(FIRE, tiny_model, other)["fire"]
    np.testing.assert_array_equal(start_over.sum, want.sum)


def test_more_batches_of_the_same_beginning_are_added(tiny_model, batches, kept, passes):
    first, save = kept
    more = mj.reduce(FIRE, tiny_model, batches[:3], save=save)["fire"]
    assert len(passes) == 1
    want = mj.reduce(FIRE, tiny_model, batches[:3])["fire"]
    np.testing.assert_array_equal(more.sum, want.sum)
    assert more.tokens.sum() > first.tokens.sum()


def test_sums_of_another_model_are_refused(tiny_model, batches, kept):
    _, save = kept
    changed = nnx.clone(tiny_model)
    changed.lm.embed[...] = changed.lm.embed[...].at[0, 0].add(1e-3)
    with pytest.raises(ValueError, match="sums.npz was made for .* it differs in model; give"):
        mj.reduce(FIRE, changed, batches[:2], save=save)


def test_errors(tiny_model, batches):
    message = r"capture 'x' \(keep\) cannot be merged over batches; use stats"
    with pytest.raises(ValueError, match=message):
        mj.reduce({"x": mj.keep(S.lm.embed)}, tiny_model, batches)
    with pytest.raises(ValueError, match="counts: there was no batch to reduce"):
        mj.reduce(ASKED, tiny_model, [], label="counts")
