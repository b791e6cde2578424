"""Sums over batches are exact, and do not know whether they were interrupted."""

from __future__ import annotations

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok

pytestmark = pytest.mark.usefixtures("quick_to_compile")

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
    for name in ("ids", "position", "image_at"):
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
    after, lazy, tiny_model, batches, total, tmp_path
):
    save = tmp_path / "sums.npz"
    uninterrupted = tmp_path / "other.npz"
    mj.reduce(ASKED, tiny_model, batches, save=uninterrupted)

    def some():
        yield from batches[:after]
        raise Killed

    with pytest.raises(Killed):
        mj.reduce(ASKED, tiny_model, some(), save=save, every=1)
    rest = Counted(batches)
    again = mj.reduce(ASKED, tiny_model, iter(rest) if lazy else rest, save=save)
    assert save.read_bytes() == uninterrupted.read_bytes()
    assert rest.made == (list(range(5)) if lazy else list(range(after, 5)))
    for name, value in total.items():
        assert again[name].kinds == value.kinds and type(again[name]) is type(value)
        for field in vars(value):
            np.testing.assert_array_equal(getattr(again[name], field), getattr(value, field))
    finished = Counted(batches)
    mj.reduce(ASKED, tiny_model, finished, save=save)
    assert not finished.made


class Counted:
    """A sequence that remembers which batches it made."""

    def __init__(self, batches):
        self.batches, self.made = batches, []

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        batch = self.batches[i]
        self.made.append(i)
        return batch


def test_edits_are_in_the_sums(tiny_model, batches):
    edits = mj.ablate(S.lm.mlp.act[2])
    asked = {"fire": mj.stats(S.lm.mlp.act)}
    found = mj.reduce(asked, tiny_model, batches[:2], edits)["fire"]
    assert not found.positive[2].any() and found.positive[1].any() and found.tokens[2] == 30


@pytest.mark.parametrize(
    ("asked", "edits"),
    [
        ({"fire": mj.stats(S.lm.mlp.act, by=tok.kind)}, mj.ablate(S.lm.mlp.act[1])),
        ({"fire": mj.stats(S.lm.mlp.act, by=tok.kind, where=tok.text)}, None),
        ({"fire": mj.stats(S.lm.mlp.gated, by=tok.kind)}, None),
        ({"other": mj.stats(S.lm.mlp.act, by=tok.kind)}, None),
    ],
)
def test_sums_of_something_else_are_refused(asked, edits, tiny_model, batches, tmp_path):
    save = tmp_path / "sums.npz"
    mj.reduce({"fire": mj.stats(S.lm.mlp.act, by=tok.kind)}, tiny_model, batches[:1], save=save)
    before = save.read_bytes()
    with pytest.raises(
        ValueError, match=r"sums.npz holds sums of another model, captures or edits: remove"
    ):
        mj.reduce(asked, tiny_model, batches[:1], edits, save=save)
    assert save.read_bytes() == before


def test_errors(tiny_model, batches):
    message = r"capture 'x' \(keep\) cannot be added up over batches; use stats"
    with pytest.raises(ValueError, match=message):
        mj.reduce({"x": mj.keep(S.lm.embed)}, tiny_model, batches)
    with pytest.raises(ValueError, match="counts: there was no batch to reduce"):
        mj.reduce(ASKED, tiny_model, [], label="counts")
