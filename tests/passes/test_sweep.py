"""A sweep is a loop of runs, with what is clean shared."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import binding
from mllm_jax.passes import clean_pass, sweep


def metric(out):
    return {"logits": out.logits, "elements": out.receipts[0].elements}


BASIS = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
EDITS = {
    "layers and neurons": [mj.ablate(S.lm.mlp.act[layer, [1, layer]]) for layer in (1, 2, 3)],
    "all units beside some": [mj.ablate(S.lm.mlp.act[2]), mj.ablate(S.lm.mlp.act[2, [0]])],
    "strengths": [mj.scale(S.lm.resid_post[3], a) for a in (0.0, 0.5, 2.0)],
    "tokens": [mj.ablate(S.lm.resid_mid[2], where=w) for w in (tok.image, tok.text, tok.last)],
    "by step": [mj.per_step(mj.ablate(S.lm.mlp.act[3]), [a, 1.0]) for a in (0.0, -1.0)],
    "pairs of rows": [
        mj.patch(S.lm.embed, *rows, where=tok.image) for rows in (([0], [1]), ([1], [0]))
    ],
    "vision": [mj.ablate(S.vision.mlp.act[layer]) for layer in (0, 1)],
    "ranks": [mj.project_out(S.lm.resid_post[2], BASIS[:, :r]) for r in (1, 3, 2)],
    "a subspace of rows": [
        mj.patch(S.lm.resid_mid[1], 0, 1, where=tok.image, basis=BASIS[:, :r]) for r in (3, 1)
    ],
    "some by step": [
        mj.replace(S.lm.mlp.act[3], 0.5),
        mj.per_step(mj.replace(S.lm.mlp.act[2], 0.5), [0.3, 1.0]),
    ],
    "logits of rows": [mj.patch(S.logits, *rows, where=tok.last) for rows in ((0, 1), (1, 0))],
    "two edits": [
        mj.ablate(S.projector.act[0, [i]]) >> mj.add(S.lm.resid_post[i], 1.0) for i in (1, 2)
    ],
}


def cases():
    """All of them in chunks; in the quick suite two of them at once as well."""
    for name, chunk in itertools.product(EDITS, (None, 2)):
        quick = chunk or name in ("layers and neurons", "vision")
        quick = quick and name not in ("some by step", "a subspace of rows", "logits of rows")
        marks = () if quick else pytest.mark.slow
        yield pytest.param(EDITS[name], chunk, id=f"{name}-{chunk}", marks=marks)


@pytest.mark.parametrize(("edits", "chunk"), list(cases()))
def test_equals_a_loop(edits, chunk, tiny_model, make_batch):
    batch = make_batch()
    rows = mj.sweep(metric, tiny_model, batch, mj.stack(edits), chunk=chunk)
    for i, edit in enumerate(edits):
        alone = metric(mj.run(tiny_model, batch, edit))
        np.testing.assert_allclose(rows["logits"][i], alone["logits"], atol=1e-5)
        np.testing.assert_array_equal(rows["elements"][i], alone["elements"])


def test_another_sweep_of_the_same_structure_does_not_recompile(tiny_model, make_batch):
    batch = make_batch()
    sweep = [mj.ablate(S.lm.mlp.act[layer, [layer]]) for layer in (0, 1, 2)]
    mj.sweep(metric, tiny_model, batch, sweep)
    before = mj.compiles()
    again = [mj.ablate(S.lm.mlp.act[layer, [5, 6, 7]], where=tok.image) for layer in (3, 0, 1)]
    jax.block_until_ready(mj.sweep(metric, tiny_model, batch, again))
    assert mj.compiles() == before


def test_another_strength_does_not_recompile(tiny_model, make_batch):
    batch = make_batch()

    def rows(by):
        edits = [mj.scale(S.lm.mlp.act[layer], by) for layer in range(4)]
        return mj.sweep(metric, tiny_model, batch, edits)["logits"]

    off, before = rows(0.0), mj.compiles()
    loud = rows(2.0)
    assert mj.compiles() == before
    assert np.abs(off - loud).max() > 1e-3


def one_word(out, word):
    return out.logits[:, word]


def test_a_metric_may_hold_arrays(tiny_model, make_batch):
    batch, edits = make_batch(), EDITS["strengths"]
    whole = mj.sweep(metric, tiny_model, batch, edits)["logits"]
    mj.sweep(jax.tree_util.Partial(one_word, word=np.int32(2)), tiny_model, batch, edits)
    before = mj.compiles()
    rows = mj.sweep(jax.tree_util.Partial(one_word, word=np.int32(5)), tiny_model, batch, edits)
    np.testing.assert_allclose(rows, whole[..., 5], atol=1e-6)
    assert mj.compiles() == before


def everything(out):
    return out.logits, out.captures, out.receipts


ASKED = {
    "one": mj.keep(S.lm.resid_post[1]),
    "some": mj.keep(S.lm.attn_out[[3, 0]]),
    "fire": mj.stats(S.lm.mlp.act, by=tok.kind),
    "normed": mj.mean(S.lm.norm),
    "tower": mj.keep(S.vision.resid_post),
}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


WIDE = np.random.default_rng(1).normal(size=32).astype(np.float32)
SHARED = {name: EDITS[name] for name in ("layers and neurons", "vision", "two edits")} | {
    "vision, whole layers": [mj.ablate(S.vision.mlp.out[layer]) for layer in (0, 1)],
    "all channels of every layer": [mj.add(S.lm.resid_post[i:], a * WIDE) for i in (0, 2)
                                    for a in (1.0, -2.0)],
}  # fmt: skip


@pytest.mark.parametrize(
    "asked", [pytest.param(ASKED, marks=pytest.mark.slow), {}], ids=["captures", "logits alone"]
)
@pytest.mark.parametrize(
    "name", [n if n in EDITS and n != "two edits" else pytest.param(n, marks=pytest.mark.slow)
             for n in SHARED]
)  # fmt: skip
def test_shared_is_unshared(name, asked, tiny_model, make_batch):
    """Counts to the last bit, floats to 1e-5: two programs may round the same sums otherwise."""
    batch, edits = make_batch(images=(1, 0)), SHARED[name]
    a, b = (
        mj.sweep(everything, tiny_model, batch, edits, asked, share=share, chunk=2)
        for share in (True, False)
    )
    for x, y in zip(a[2], b[2], strict=True):
        np.testing.assert_array_equal(x.tokens, y.tokens)
        np.testing.assert_array_equal(x.elements, y.elements)
        np.testing.assert_allclose(x.norm, y.norm, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(a[:2]), jax.tree.leaves(b[:2]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def test_captures_are_those_of_a_run(tiny_model, make_batch):
    batch, edits = make_batch(), EDITS["layers and neurons"]
    rows = mj.sweep(everything, tiny_model, batch, edits, ASKED)
    for i, edit in enumerate(edits):
        alone = everything(mj.run(tiny_model, batch, edit, ASKED))
        for x, y in zip(jax.tree.leaves(rows), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[i], y, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["right", "left"])
def test_clean_tokens_are_read_once(pad, tiny_model, make_batch):
    """Edits of the last tokens leave a prefix clean, whose keys and values all lanes share."""
    batch = make_batch(images=(4, 3), words=(21, 23), pad=pad)
    late = np.arange(batch.ids.shape[1]) >= 32
    where = tok.mask(late & batch.valid)
    edits = {
        "layers": [mj.ablate(S.lm.mlp.act[i], where=where) for i in (0, 2, 3)],
        "tokens": [mj.add(S.lm.resid_pre[1], 2.0, where=w) for w in (where, tok.last)],
        "heads": [mj.scale(S.lm.attn.heads[i, [0]], 3.0, where=where) for i in (0, 3)],
        "cut": [mj.knockout(S.lm.attn[i:], to=tok.last, on=tok.image) for i in (0, 2)],
        "rows": [mj.patch(S.lm.resid_post[i], 0, 1, where=tok.last) for i in (0, 2)],
    }
    asked = {"mean": mj.mean(S.lm.resid_post, where=where), "norm": mj.mean(S.lm.norm, where=where)}
    for swept in edits.values():
        bound = [binding.bind(tiny_model, batch, edit, None)[0] for edit in swept]
        bound_asked = binding.bind(tiny_model, batch, None, asked)[1]
        assert all(
            clean_pass.prefix_length(batch, b, bound_asked, "last") in (16, 32) for b in bound
        )
        rows = mj.sweep(everything, tiny_model, batch, swept, asked)
        for i, edit in enumerate(swept):
            alone = everything(mj.run(tiny_model, batch, edit, asked))
            for x, y in zip(jax.tree.leaves(rows), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(x[i], y, atol=2e-5, rtol=1e-5)


def test_a_prefix_that_something_reads_is_not_clean(tiny_model, make_batch):
    batch = make_batch(images=(4, 3), words=(21, 23))

    def prefix(edit, asked=None, logits="last"):
        bound = binding.bind(tiny_model, batch, edit, asked)
        return clean_pass.prefix_length(batch, *bound, logits)

    late = mj.ablate(S.lm.mlp.act[1], where=tok.last)
    assert prefix(late) >= 16
    assert prefix(mj.ablate(S.lm.mlp.act[1], where=tok.image)) == 0
    assert prefix(late, logits="all") == 0
    assert prefix(late, {"x": mj.keep(S.lm.resid_post[0], where=tok.last)}) == 0
    assert prefix(late, {"x": mj.mean(S.lm.resid_post, where=tok.image)}) == 0
    assert prefix(late, {"x": mj.mean(S.projector.out)}) == 0


def test_a_killed_sweep_continues(tmp_path, monkeypatch, tiny_model, make_batch):
    batch = make_batch()
    swept = [mj.ablate(S.lm.mlp.act[i, [i]]) for i in (3, 1, 0, 2, 1)]
    path = tmp_path / "rows.npz"
    write, written = sweep._Rows.write, []

    def killed_after(count):
        def put(self, numbers, found):
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(sorted(numbers.tolist()))
            write(self, numbers, found)

        return put

    monkeypatch.setattr(sweep._Rows, "write", killed_after(2))
    with pytest.raises(KeyboardInterrupt):
        mj.sweep(metric, tiny_model, batch, swept, chunk=2, save=path)
    monkeypatch.setattr(sweep._Rows, "write", killed_after(99))
    rows = mj.sweep(metric, tiny_model, batch, swept, chunk=2, save=path)
    assert sorted(i for some in written for i in some) == [0, 1, 2, 3, 4] and len(written) == 3
    same(rows, mj.sweep(metric, tiny_model, batch, swept, chunk=2))
    with pytest.raises(ValueError, match=r"rows.npz was .* differs in edits \(5 there, 2 now\)"):
        mj.sweep(metric, tiny_model, batch, swept[:2], chunk=2, save=path)
    with pytest.raises(ValueError, match="differs in edits; give another path"):
        mj.sweep(metric, tiny_model, batch, [*swept[:4], swept[0]], chunk=2, save=path)
    more = mj.sweep(metric, tiny_model, batch, [*swept, swept[0]], chunk=2, save=path)
    assert len(written) == 3 + 3 + 1 and 5 in written[-1]
    same(jax.tree.map(lambda a: a[:5], more), rows)
    same(*(jax.tree.map(lambda a, i=i: a[i], more) for i in (5, 0)))


def logit(out, place):
    return out.logits[..., place]


def test_rows_of_something_else_are_refused(tmp_path, tiny_model, make_batch):
    """Of functions, code and values are compared: two lambdas of one line are two metrics."""
    batch, swept = make_batch(), [mj.ablate(S.lm.mlp.act[i]) for i in (1, 2)]
    path = tmp_path / "rows.npz"
    one, two = (lambda out: out.logits[:, 3]), (lambda out: out.logits[:, 4])
    rows = mj.sweep(one, tiny_model, batch, swept, save=path)
    other = make_batch(seed=5)
    asked = {"x": mj.mean(S.lm.embed)}
    for metric, data, how, differs in (
        (two, batch, {}, r"code \(metric\)"),
        (functools.partial(logit, place=3), batch, {}, r"code \(metric\)"),
        (one, other, {}, "data"),
        (one, batch, {"logits": "all"}, r"settings \(logits\)"),
        (one, batch, {"captures": asked}, "captures"),
    ):
        with pytest.raises(ValueError, match=f"rows.npz was made .* differs in {differs}; give"):
            mj.sweep(metric, tiny_model, data, swept, save=path, **how)
    before = mj.compiles()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            clean_pass, "compute_clean_pass", None
        )  # nothing is run for rows that are there
        same(mj.sweep(lambda out: out.logits[:, 3], tiny_model, batch, swept, save=path), rows)
    assert mj.compiles() == before
    start_over = mj.sweep(two, tiny_model, batch, swept, save=path, restart=True)
    same(start_over, mj.sweep(two, tiny_model, batch, swept))


def test_arrays_given_to_a_metric_are_part_of_it(tmp_path, tiny_model, make_batch):
    batch, swept = make_batch(), [mj.ablate(S.lm.mlp.act[1])]
    three, four = (jax.tree_util.Partial(logit, place=np.int32(i)) for i in (3, 4))
    mj.sweep(three, tiny_model, batch, swept, save=tmp_path / "rows.npz")
    with pytest.raises(ValueError, match=r"differs in code \(metric\)"):
        mj.sweep(four, tiny_model, batch, swept, save=tmp_path / "rows.npz")


def test_lanes_of_a_chunk_begin_at_near_layers_and_tokens():
    first, prefix = np.array([5, 0, 3, 5, 4, 1]), np.array([0, 0, 16, 16, 0, 0])
    grown = clean_pass.CleanPass(
        types.SimpleNamespace(ids=np.zeros((1, 32))), first, None, prefix, layers=6
    )
    assert [c.tolist() for c in grown.chunks(2)] == [[1, 5], [4, 0], [2, 3]]
    assert grown.cost(2) == 3 * (6 * 32 + 2 * 32 + 3 * 16)


def test_lanes_are_by_the_memory_of_the_device(tiny_model, monkeypatch):
    """An eighth of what the model leaves of it; a CPU does not know its memory."""
    assert sweep.lane_budget(tiny_model) == sweep.BUDGET
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_model))
    monkeypatch.setattr(
        type(jax.devices()[0]), "memory_stats", lambda _: {"bytes_limit": 80 * weights}
    )
    assert sweep.lane_budget(tiny_model) == 79 * weights // 8
    clean = clean_pass.CleanPass(
        types.SimpleNamespace(ids=np.zeros((1, 32))), np.zeros(64, int), None, np.zeros(64, int)
    )
    lanes = [sweep._chunk_size(clean, 16, 1, 16 * n) for n in (0, 1, 9, 100)]
    assert lanes == [1, 1, 8, 64]


def test_edits_of_two_structures_are_refused():
    with pytest.raises(ValueError, match="edit 1 of the sweep is scale lm.mlp.act"):
        mj.stack([mj.ablate(S.lm.mlp.act), mj.scale(S.lm.mlp.act, 2.0)])
    with pytest.raises(ValueError, match="no edit to sweep"):
        mj.stack([])
    patch, here = mj.patch(S.lm.resid_mid, 0, 1), S.lm.resid_post
    some = mj.patch(S.lm.resid_mid, 0, 1, basis=BASIS)
    with pytest.raises(
        ValueError, match=r"edit 1 of the sweep is patch lm.resid_mid \(basis\), the"
    ):
        mj.stack([patch, some])
    with pytest.raises(ValueError, match="the same function in a call"):
        mj.stack([mj.call(here, lambda x: x), mj.call(here, lambda x: x)])
    with pytest.raises(ValueError, match=r"call lm.resid_post sin \(a\), the first is .* \(b\)"):
        mj.stack([mj.call(here, np.sin, b=1.0), mj.call(here, np.sin, a=1.0)])


def test_lanes_with_and_without_steps_and_of_any_rank_are_one_structure(tiny_model, make_batch):
    """A strength of 1 is the edit to the last bit; columns of zeros are in no span."""
    batch = make_batch()
    for name in ("ranks", "a subspace of rows", "some by step"):
        lanes = [binding.bind(tiny_model, batch, edit, None)[0] for edit in EDITS[name]]
        equal = sweep._equalise_lanes(lanes)
        assert len({jax.tree.structure(lane) for lane in equal}) == 1
        x = np.random.default_rng(2).normal(size=(*batch.ids.shape, 32)).astype(np.float32)
        x = x if name != "some by step" else np.resize(x, (*batch.ids.shape, 48))
        for before, after in zip(lanes, equal, strict=True):
            a, b = (_applied(edit[0], x) for edit in (before, after))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def _applied(edit, x):
    values = {name: value[0] for name, value in edit.values.items()}
    along = {n: a[..., None] if n == "strength" else a for n, a in edit.along.items()}
    edit = dataclasses.replace(edit, values=values, along=along)
    return edit.apply(x, edit.tokens[..., None])
