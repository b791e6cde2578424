"""Every edit at every site is what NumPy does there in a plain loop over layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import binding
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.values import fit_value
from mllm_jax.passes import run
from tests.helpers import oracle

pytestmark = pytest.mark.usefixtures("op_by_op")

L = 3
PAD, IMAGE = tok.CODE["pad"], tok.CODE["image"]
VALUED = [site for site in oracle.SITES if site not in S.MASKS]


@pytest.fixture(scope="module")
def clean(model, batch, op_by_op):
    return np.asarray(mj.run(model, batch, logits="all").logits)


@pytest.fixture(scope="module")
def rows(batch, make_batch):
    """The batch, padded on either side."""
    left = make_batch(images=(1,) * 8, words=(11, 8) * 4, fill=1, pad="left")
    return {"right": batch, "left": left.replace(features=batch.features)}.get


@pytest.fixture(scope="module")
def unedited(model, pictures, op_by_op):
    """Logits of every token, and what is seen at every site."""
    return oracle.forward(model, pictures)


def logits(model, batch, edits):
    out = mj.run(model, batch, edits, logits="all")
    return np.asarray(out.logits), out.receipts


def image_tokens(site, batch) -> np.ndarray:
    """bool[B, T], by hand: patches of real tiles, without CLS; image tokens of the LM."""
    if site.module in ("lm", "logits"):
        return batch.tokens.kind == IMAGE
    patches = np.ones((len(batch.is_real_tile), 17 if site.module == "vision" else 4), bool)
    patches[:, 0] = site.module != "vision"
    return patches & batch.is_real_tile[:, None]


def some_units(width: int) -> np.ndarray:
    return np.arange(width) % 3 != 1


def columns(width: int) -> np.ndarray:
    return np.random.default_rng(width).normal(size=(width, 2)).astype(np.float32)


def project_out(x):
    q, _ = np.linalg.qr(columns(x.shape[-1]))
    return x - x @ q @ q.T


def ramp(x, axis):
    """A value for every unit of the site, laid along its axis."""
    return line(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def line(n: int) -> np.ndarray:
    return np.linspace(-1, 2, n, dtype=np.float32)


def patched(x, tokens):
    """Row 6 has the tokens of row 7, in their order; both have as many."""
    y = x.copy()
    y[6, tokens[6]] = x[7, tokens[7]]
    return y


def wave(x, a):
    return jnp.sin(x) + a


# What the user writes, given an address, its width and tokens; what NumPy does, given a tensor and
# the axis of its units. A patch reads the same tokens of the last row.
KINDS = {
    "ablate": (lambda at, n, w: mj.ablate(at, where=w), lambda x, u: np.zeros_like(x)),
    "scale": (lambda at, n, w: mj.scale(at, line(n), where=w), lambda x, u: x * ramp(x, u)),
    "add": (lambda at, n, w: mj.add(at, line(n), where=w), lambda x, u: x + ramp(x, u)),
    "replace": (
        lambda at, n, w: mj.replace(at, line(n), where=w),
        lambda x, u: np.broadcast_to(ramp(x, u), x.shape),
    ),
    "call": (
        lambda at, n, w: mj.call(at, wave, where=w, a=0.5),
        lambda x, u: np.sin(x) + 0.5,
    ),
    "project_out": (
        lambda at, n, w: mj.project_out(at, columns(n), where=w),
        lambda x, u: project_out(x),
    ),
    "patch": (lambda at, n, w: mj.patch(at, 7, 6, where=w), None),
}


@pytest.mark.parametrize("site", VALUED, ids=str)
def test_every_pair_is_the_oracle(site, model, pictures, batch, unedited):
    """Each kind edits a row, or a tile, of its own; all in one pass."""
    batch = pictures if site.module == "vision" else batch
    clean, seen = unedited
    layer = len(seen[site.name]) - 1 if site.stacked else None
    before = seen[site.name][-1]
    axis = next(i for i, a in enumerate(site.axes) if a in "EDFNKV")
    units = some_units(before.shape[axis])
    address = site[units] if layer is None else site[layer, units]
    tokens = image_tokens(site, batch)
    kinds = [k for k in KINDS if k != "patch" or site not in S.PATTERNS]
    rows = [tokens & (np.arange(len(tokens)) == row)[:, None] for row in range(8)]

    def change(x):
        y = x.copy()
        for kind, here in zip(kinds, rows, strict=False):
            new = patched(x, tokens) if kind == "patch" else KINDS[kind][1](x, axis)
            y = np.where(oracle.spread(site.axes, here, units), new, y)
        return y

    edits = Edits()
    for kind, here in zip(kinds, rows, strict=False):
        width = before.shape[-1 if kind == "project_out" else axis]  # a basis is of the last axis
        where = here | rows[7] if kind == "patch" else here
        edits = edits >> KINDS[kind][0](address, width, where)
    want, _ = oracle.forward(model, batch, [(site.name, layer, change)])
    got, receipts = logits(model, batch, edits)
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-5)

    change_ = change(before) - before
    for row, (kind, receipt) in enumerate(zip(kinds, receipts, strict=True)):
        assert abs(got - clean)[row][batch.valid[row]].max() > 1e-3, kind
        changed = change_[row]
        at = layer or 0
        assert receipt.edit == f"{kind} {site.name}"
        assert receipt.tokens[at] == rows[row].sum() > 0, kind
        np.testing.assert_allclose(receipt.elements[at], (changed != 0).sum(), rtol=0.001)
        np.testing.assert_allclose(receipt.norm[at], np.linalg.norm(changed), rtol=1e-4)
        for values in (receipt.tokens, receipt.elements, receipt.norm):  # of the other layers
            assert values[at] > 0 and not np.delete(values, at).any()


def test_head_gates_are_the_oracle(model, batch):
    gates = np.random.default_rng(3).normal(size=(L, 4)).astype(np.float32)
    changes = [
        ("lm.attn.heads", layer, lambda x, layer=layer: x * gates[layer, :, None])
        for layer in range(L)
    ]
    want, seen = oracle.forward(model, batch, changes)
    got, (receipt,) = logits(model, batch, mj.scale(S.lm.attn.heads, gates))
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-5)
    after = np.stack(seen["lm.attn.heads"])[:, batch.valid]  # [L, tokens, N, H]
    change = after - after / gates[:, None, :, None]
    np.testing.assert_array_equal(receipt.tokens, batch.valid.sum())
    np.testing.assert_array_equal(receipt.elements, batch.valid.sum() * 4 * 8)
    np.testing.assert_allclose(receipt.norm, np.sqrt((change**2).sum((1, 2, 3))), rtol=1e-4)


@pytest.mark.parametrize("heads", [None, [0, 3]])
def test_knockout_is_the_oracle(heads, model, batch, clean):
    hidden, looks = batch.tokens.kind == IMAGE, batch.tokens.last
    chosen = np.isin(np.arange(4), heads if heads else np.arange(4))

    def change(mask):
        cut = looks[:, None, :, None] & hidden[:, None, None, :] & chosen[:, None, None]
        return mask & ~cut

    changes = [("lm.attn.mask", layer, change) for layer in (1, 2)]
    want, seen = oracle.forward(model, batch, changes)
    target = S.lm.attn[1:3] if heads is None else S.lm.attn[1:3, heads]
    got, (receipt,) = logits(model, batch, mj.knockout(target, to=tok.last, on=tok.image))
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-5)
    assert abs(got - clean)[looks].max() > 1e-3
    np.testing.assert_array_equal(got[~looks], clean[~looks])
    # 8 rows, each 4 image tokens and one that looks, in each head
    np.testing.assert_array_equal(receipt.elements, np.array([0, 1, 1]) * 32 * chosen.sum())
    np.testing.assert_array_equal(receipt.tokens, [0, 8, 8])


def test_a_query_that_may_look_nowhere_gets_zeros(model, batch):
    edit = mj.knockout(S.lm.attn[2], to=tok.last, on=tok.every)
    out = mj.run(model, batch, edit, {"heads": mj.keep(S.lm.attn.heads[2], where=tok.last)})
    assert np.isfinite(out.logits).all() and not np.asarray(out["heads"]).any()


# Values in every shape that fits, where they vary along what they name.
B, T, F, N, H = 8, 15, 48, 4, 8
SHAPES = {
    "scalar": (), "F": (F,), "L F": (L, F), "B T F": (B, T, F), "B 1 F": (B, 1, F),
    "1 T 1": (1, T, 1), "L B T F": (L, B, T, F), "L 1 1 1": (L, 1, 1, 1), "L 1": (L, 1),
}  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_edit_of_neurons_is_the_oracle(data, model, batch):
    kind = data.draw(st.sampled_from(["ablate", "scale", "add", "replace"]))
    shape = SHAPES[data.draw(st.sampled_from(list(SHAPES)))]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    value, mask = rng.normal(size=shape).astype(np.float32), rng.random((L, F)) < 0.2
    tokens = rng.random(batch.valid.shape) < 0.5
    name = data.draw(st.sampled_from(["question", "image", "last", "text", "all"]))
    where = tok.mask(tokens) | tok.NAMED[name]
    picked = (tokens | tok.NAMED[name].mask(batch.tokens)) & batch.valid
    full = np.broadcast_to(_lead(value), (L, B, T, F))
    fn = {"ablate": lambda x, v: 0 * x, "scale": np.multiply, "add": np.add}
    fn = fn.get(kind, lambda x, v: v)

    def change(layer):
        at = picked[:, :, None] & mask[layer]
        return lambda x: np.where(at, fn(x, full[layer]), x)

    changes = [("lm.mlp.act", layer, change(layer)) for layer in range(L)]
    want, _ = oracle.forward(model, batch, changes)
    given_ = () if kind == "ablate" else (value,)
    got, (receipt,) = logits(model, batch, getattr(mj, kind)(mask, *given_, where=where))
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(receipt.tokens, picked.sum() * mask.any(1))


def _lead(value):
    """[L, B, T, F] from the shapes of SHAPES; two axes are layers and neurons."""
    if value.ndim == 2:
        return value[:, None, None]
    return value.reshape(*(1,) * (4 - value.ndim), *value.shape)


def test_values_for_the_chosen_units_alone(model, batch):
    chosen = [7, 3, -1]
    full = np.zeros(F, np.float32)
    full[chosen] = [1.0, -2.0, 3.0]
    some = mj.add(S.lm.mlp.act[1, chosen], [1.0, -2.0, 3.0])
    same(model, batch, some, mj.add(S.lm.mlp.act[1, chosen], full))


def test_values_of_heads(model, batch):
    heads = S.lm.attn.heads
    gates = np.array([1.0, 0.5, -1.0, 0.0], np.float32)  # [N]
    by_head = (
        mj.scale(heads[2, [2]], -1.0) >> mj.scale(heads[2, [1]], 0.5) >> mj.ablate(heads[2, 3])
    )
    same(model, batch, mj.scale(heads[2], gates), by_head)
    by_layer = np.ones((L, N), np.float32)
    by_layer[2] = gates
    same(model, batch, mj.scale(heads, by_layer), by_head)
    same(model, batch, mj.scale(heads[2, [2, 1, 3]], [-1.0, 0.5, 0.0]), by_head)
    full = np.broadcast_to(gates[:, None], (N, H))  # [N, H]
    same(model, batch, mj.scale(heads[2], full), by_head)


def test_listed_values_follow_the_list(model, batch):
    heads = S.lm.attn.heads
    by_unit = mj.scale(heads[2], [0.0, 2.0, -1.0, 0.5])
    same(model, batch, mj.scale(heads[2, [3, 0, 2, 1]], [0.5, 0.0, -1.0, 2.0]), by_unit)
    vectors = np.random.default_rng(0).normal(size=(2, H)).astype(np.float32)
    two = mj.add(heads[2, [3, 0]], vectors)
    same(model, batch, two, mj.add(heads[2], np.stack([vectors[1], *np.zeros((2, H)), vectors[0]])))


def test_values_by_layer_beside_a_list_of_layers_in_another_order(model, batch):
    """`keep` follows the list and a value by layer does not: layers were exchanged."""
    value = np.random.default_rng(0).normal(size=(L, 32)).astype(np.float32)
    for layers in ([2, 1, 0], [2, 2, 1], [0, -1, 1]):
        with pytest.raises(ValueError, match=r"lm.resid_post: a value for each of 3 layers is in"):
            binding.bind(model, batch, mj.add(S.lm.resid_post[layers], value), None)
    same(model, batch, mj.add(S.lm.resid_post[[0, 1, -1]], value), mj.add(S.lm.resid_post, value))
    some = [mj.add(S.lm.resid_post[n], value[n]) for n in (0, 2)]
    same(model, batch, mj.add(S.lm.resid_post[[2, 0]], value), some[0] >> some[1])


SQUARE = {  # as many heads as channels a head; as many layers, or not
    layers: {"lm.attn.heads": S.SiteShape(layers, (2, 9, 4, 4), np.float32),
             "lm.attn.pattern": S.SiteShape(layers, (2, 4, 9, 9), np.float32)}
    for layers in (2, 3, 4)
}  # fmt: skip
MAPS = {"lm": tok.TokenMap.grid(np.zeros(2, int), (3, 3), False, np.ones(2, bool))}


@pytest.mark.parametrize(
    ("layers", "site", "given", "read"),
    [
        (3, "heads", (), (1, 1, 1, 1, 1)), (3, "heads", (1,), (1, 1, 1, 1, 1)),
        (4, "heads", (4,), (1, 1, 1, 4, 1)), (3, "heads", (3, 4), (3, 1, 1, 4, 1)),
        (3, "heads", (4, 4), (1, 1, 1, 4, 4)), (4, "heads", (4, 1, 4), (4, 1, 1, 1, 4)),
        (4, "heads", (2, 9, 1, 4), (1, 2, 9, 1, 4)), (4, "heads", (4, 4, 4), (4, 1, 1, 4, 4)),
        (3, "pattern", (2, 4, 9, 9), (1, 2, 4, 9, 9)),
        (3, "pattern", (3, 4, 1, 9), (3, 1, 4, 1, 9)),
    ],
)  # fmt: skip
def test_how_values_are_read(layers, site, given, read):
    """[L B T N H] and [L B N T S], 1 where a value repeats."""
    value = np.random.default_rng(0).normal(size=given).astype(np.float32)
    (bound,) = binding.bind_edits(mj.add(S.get(f"lm.attn.{site}"), value), SQUARE[layers], MAPS)
    want = np.broadcast_to(value.reshape(read), (layers, *read[1:]))
    np.testing.assert_array_equal(bound.values["value"], want)


@pytest.mark.parametrize(
    ("layers", "site", "given", "message"),
    [
        (4, "heads", (4, 4), r"may be \[L N\] or \[N H\]; write it with all axes of "
         r"\[L B T N H\]: \[4, 1, 1, 4, 1\] or \[1, 1, 1, 4, 4\]"),
        (3, "heads", (1, 4), r"may be \[L N\] or \[N H\]"),
        (4, "heads", (4, 1), r"may be \[L N\] or \[N H\]"),
        (2, "pattern", (2, 4, 9, 9), r"may be \[L N T S\] or \[B N T S\]"),
        (3, "heads", (5,), r"a value of shape \(5,\) does not fit; the site is \[L B T N H\]"),
        (3, "heads", (9, 4, 4), r"shape \(9, 4, 4\) does not fit"),
    ],
)  # fmt: skip
def test_values_without_one_reading_are_refused(layers, site, given, message):
    with pytest.raises(ValueError, match=message):
        binding.bind_edits(mj.add(S.get(f"lm.attn.{site}"), np.ones(given)), SQUARE[layers], MAPS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mj.add(RESID, V * 1j), "lm.resid_.*: a value must hold real numbers, not complex"),
        (lambda: mj.replace(RESID, None), "a value must hold real numbers, not object"),
        (lambda: mj.scale(ACT, "2"), "a value must hold real numbers, not <U1"),
        (lambda: mj.project_out(RESID, V * 1j), "a value must hold real numbers, not complex"),
        (lambda: mj.project_out(RESID, V * np.nan), "the basis has numbers that are not finite"),
        (
            lambda: mj.patch(RESID, 0.9, 1),
            "source and into of patch must be row numbers, not float64",
        ),
        (
            lambda: mj.patch(RESID, 0, True),
            "source and into of patch must be row numbers, not bool",
        ),
        (lambda: mj.call(RESID, lambda x: None), "the call lm.resid_.* returned NoneType: return"),
        (lambda: mj.call(RESID, lambda x: x * 1j), "returned complex64: return an array of real"),
        (lambda: mj.call(RESID, lambda x: x.sum()), r"returned \(\) for an x of \(8, 15, 32\)"),
        (
            lambda: mj.call(RESID, lambda x: x[:1]),
            r"returned \(1, 15, 32\) for an x of \(8, 15, 32",
        ),
        (lambda: mj.call(RESID, "relu"), "fn is of type str, expected a function of jax.numpy"),
        (lambda: mj.patch(RESID, 2**32, 2), "reads row 2147483647 and writes row 2: the batch has"),
        (lambda: mj.patch(RESID, 0, 2**32 + 2), "writes row 2147483647: the batch has"),
        (lambda: mj.ablate(S.lm.resid_post[2**32]), "layer 2147483647 is out of range"),
        (lambda: mj.ablate(S.lm.mlp.act[1, [-(2**32) + 3]]), "unit -2147483648 is out of range"),
        (lambda: mj.ablate(S.lm.mlp.act[2**32 :]), "selects no layer or unit"),
        (
            lambda: mj.add(RESID, np.float64(V) * 1e300),
            "a value of .*e.300 is infinite in the site's dtype fl",
        ),
        (
            lambda: mj.scale(RESID, -1e39),
            "a value of 1e.39 is infinite in the site's dtype float32",
        ),
        (lambda: mj.per_step(mj.ablate(RESID), [None]), "strengths that are real numbers, not obj"),
        (lambda: mj.per_step(mj.ablate(RESID), ["1"]), "strengths that are real numbers, not <U1"),
        (lambda: mj.per_step([mj.ablate(RESID)], [1.0]), "edits is of type list, expected edits"),
    ],
)
def test_what_is_no_real_number_is_refused(make, message, model, batch):
    """Each was cast or repeated: None was NaN, rows 0.9 and 2**32 were row 0, 1e300 infinite."""
    with pytest.raises(ValueError, match=message):
        mj.run(model, batch, make())


def same(model, batch, a, b, atol=1e-6):
    ours, theirs = (logits(model, batch, edits)[0] for edits in (a, b))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


# Algebra.

ACT, RESID = S.lm.mlp.act[1:3], S.lm.resid_post[1]
V = np.random.default_rng(1).normal(size=32).astype(np.float32)
WHERE = (None, tok.image)


@pytest.mark.parametrize("where", WHERE)
def test_edits_that_say_nothing_are_bitwise_clean(where, model, batch, clean):
    identities = [
        mj.scale(ACT, 1.0, where=where),
        mj.add(RESID, 0.0 * V, where=where),
        mj.call(RESID, lambda x: x, where=where),
        mj.scale(ACT, np.ones((L, F))),
    ]
    for edits in identities:
        got, (receipt,) = logits(model, batch, edits)
        np.testing.assert_array_equal(got, clean)
        assert receipt.tokens.any() and not receipt.elements.any() and not receipt.norm.any()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lambda w: mj.add(RESID, V, where=w) >> mj.add(RESID, -V, where=w), None),
        (lambda w: mj.scale(ACT, 0.0, where=w), lambda w: mj.ablate(ACT, where=w)),
        (lambda w: mj.replace(ACT, 0.0, where=w), lambda w: mj.ablate(ACT, where=w)),
        (
            lambda w: mj.scale(ACT, 3.0, where=w) >> mj.scale(ACT, -0.5, where=w),
            lambda w: mj.scale(ACT, -1.5, where=w),
        ),
        (
            lambda w: mj.add(RESID, V, where=w) >> mj.replace(RESID, 2 * V, where=w),
            lambda w: mj.replace(RESID, 2 * V, where=w),
        ),
        (
            lambda w: mj.replace(RESID, 2 * V, where=w) >> mj.add(RESID, V, where=w),
            lambda w: mj.replace(RESID, 3 * V, where=w),
        ),
        (
            lambda w: mj.project_out(RESID, V, where=w) >> mj.project_out(RESID, V, where=w),
            lambda w: mj.project_out(RESID, -2 * V, where=w),
        ),
        (
            lambda w: mj.add(RESID, V, where=w) >> mj.project_out(RESID, V, where=w),
            lambda w: mj.project_out(RESID, V, where=w),
        ),
        (
            lambda w: mj.project_out(RESID, np.eye(32), where=w),
            lambda w: mj.ablate(RESID, where=w),
        ),
    ],
    ids=["add -add", "scale 0", "replace 0", "scale scale", "replace wins", "replace add",
         "project twice", "project takes what is added", "project all"],
)  # fmt: skip
def test_algebra(left, right, where, model, batch, clean):
    got, _ = logits(model, batch, left(where))
    want = clean if right is None else logits(model, batch, right(where))[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_order_is_respected(model, batch):
    scale, add = mj.scale(RESID, -2.0), mj.add(RESID, V)
    first, second = (logits(model, batch, e)[0] for e in (scale >> add, add >> scale))
    assert abs(first - second).max() > 1e-2
    same(model, batch, scale >> add, mj.call(RESID, lambda x, v: -2 * x + v, v=V), 1e-5)
    same(model, batch, add >> scale, mj.call(RESID, lambda x, v: -2 * (x + v), v=V), 1e-5)
    three = mj.ablate(ACT) >> scale >> add
    assert [edit.kind for edit in three] == ["ablate", "scale", "add"] and len(three) == 3
    _, receipts = logits(model, batch, three)
    assert [r.edit for r in receipts] == [
        "ablate lm.mlp.act", "scale lm.resid_post", "add lm.resid_post"
    ]  # fmt: skip


def test_patch_is_replace_with_what_was_seen(model, batch):
    image = np.flatnonzero(batch.tokens.kind[0] == IMAGE)
    basis, _ = np.linalg.qr(columns(32))
    x = oracle.forward(model, batch)[1]["lm.resid_post"][1]
    value = np.zeros_like(x)
    value[1, image] = x[0, image]
    at = np.zeros(batch.valid.shape, bool)
    at[1, image] = True
    patch = mj.patch(RESID, 0, 1, where=tok.image)
    same(model, batch, patch, mj.replace(RESID, value, where=at), 1e-5)
    value[1, image] = x[1, image] + (x[0, image] - x[1, image]) @ basis @ basis.T
    subspace = mj.patch(RESID, 0, 1, where=tok.image, basis=3 * columns(32))
    same(model, batch, subspace, mj.replace(RESID, value, where=at), 1e-5)


def test_a_patch_of_several_rows_reads_what_was_there(model, batch):
    """Rows that swap, a row read twice, and a row that only reads."""
    pairs = mj.patch(RESID, [1, 3, 3], [3, 1, 5], where=tok.image)
    value = oracle.forward(model, batch)[1]["lm.resid_post"][1]
    value[[3, 1, 5]] = value[[1, 3, 3]]
    at = np.isin(np.arange(8), [1, 3, 5])[:, None] & (batch.tokens.kind == IMAGE)
    same(model, batch, pairs, mj.replace(RESID, value, where=at), 1e-5)
    one_to_all = mj.patch(RESID, 1, [3, 5], where=tok.image)
    same(model, batch, one_to_all, mj.patch(RESID, 1, 3, where=tok.image)
         >> mj.patch(RESID, 1, 5, where=tok.image))  # fmt: skip


@pytest.mark.parametrize("pad", ["left", "right"])
def test_patch_matches_tokens_in_rows_of_unequal_length(pad, model, rows, clean):
    """A row patched at its last token from another row says what the other row says."""
    batch = rows(pad)
    got, _ = logits(model, batch, mj.patch(S.lm.norm, 0, 1, where=tok.last))
    was, now = clean[rows("right").tokens.last], got[batch.tokens.last]
    np.testing.assert_allclose(now[1], was[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.delete(now, 1, 0), np.delete(was, 1, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("site", [S.lm.mlp.act, S.lm.resid_post, S.lm.embed], ids=str)
def test_padding_is_never_edited(site, pad, model, rows):
    batch = rows(pad)
    where = ~batch.valid
    where[1, batch.last[1]] = True
    edits = [mj.add(site, 5.0, where=w) for w in (where, tok.last & tok.mask(where))]
    (a, (first,)), (b, (second,)) = (logits(model, batch, e) for e in edits)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.tokens, 1)
    np.testing.assert_array_equal(first.elements, second.elements)


def test_only_padding_changes_nothing_where_it_cannot_be_refused(model, batch, clean):
    (bound,), _ = binding.bind(model, batch, mj.ablate(S.lm.resid_post), None)
    nowhere = dataclasses.replace(bound, tokens=np.zeros_like(bound.tokens))
    out = run.compiled_run(model, batch, (nowhere,), {}, logits="all", remat=False)
    np.testing.assert_array_equal(out.logits, clean)
    assert not out.receipts[0].tokens.any() and not out.receipts[0].elements.any()


SELECTORS = {
    "system": lambda t: t.kind == tok.CODE["system"],
    "question": lambda t: t.kind == tok.CODE["question"],
    "image": lambda t: t.kind == tok.CODE["image"],
    "text": lambda t: np.isin(t.kind, [tok.CODE["system"], tok.CODE["question"]]),
    "last": lambda t: t.last,
    "all": lambda t: t.kind != PAD,
}
WHERES = [(tok.NAMED[name], want) for name, want in SELECTORS.items()] + [
    (tok.row(1), lambda t: t.row == 1),
    (tok.column(0), lambda t: t.column == 0),
    (tok.tile(0), lambda t: t.tile == 0),
    (tok.image & ~tok.row(0), lambda t: t.row == 1),
    (tok.last | tok.column(1), lambda t: t.last | (t.column == 1)),
    (~tok.text, lambda t: t.kind == tok.CODE["image"]),
]


@pytest.mark.parametrize(("where", "want"), WHERES)
def test_where(where, want, model, batch, unedited):
    """Exactly the tokens meant change at the site, and the receipt says how many."""
    edit = mj.add(S.lm.mlp.out[1], 1.0, where=where)
    out = mj.run(model, batch, edit, {"x": mj.keep(S.lm.mlp.out[1])}, logits="none")
    before = np.where(batch.valid[..., None], unedited[1]["lm.mlp.out"][1], 0)
    changed = (np.asarray(out["x"]) - before).round(4)
    mask = want(batch.tokens)
    np.testing.assert_array_equal(changed, np.broadcast_to(mask[..., None], changed.shape))
    assert 0 < out.receipts[0].tokens[1] == mask.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_every_selector(kind, model, batch, clean, unedited):
    """Compiled, one program for all selectors of a kind; a patch reads a row of equal length."""
    site, layer = S.lm.mlp.out, 1
    before, some = unedited[1][site.name][layer], np.random.default_rng(0).random((B, T)) < 0.5
    some[6] = some[0]
    last = clean[batch.tokens.last]
    asked = {"x": mj.keep(site[layer])}
    for where, want in [*WHERES, (some, lambda t: some & (t.kind != PAD))]:
        mask = want(batch.tokens)
        if kind == "patch":
            edit, new = mj.patch(site[layer], 0, 6, where=where), before[[*range(6), 0, 7]]
            mask = mask & (np.arange(B) == 6)[:, None]
        else:
            make, change = KINDS[kind]
            edit, new = make(site[layer], 32, where), change(before, 2)
        with jax.disable_jit(False):
            out = mj.run(model, batch, edit, asked)
        after = np.where(mask[..., None], new, before)
        np.testing.assert_allclose(out["x"][batch.valid], after[batch.valid], rtol=0, atol=1e-5)
        assert abs(out.logits - last).max() > 1e-3
        (receipt,), change_ = out.receipts, (after - before)[batch.valid]
        np.testing.assert_array_equal(receipt.tokens, [0, mask.sum(), 0])
        np.testing.assert_allclose(receipt.elements[layer], (change_ != 0).sum(), rtol=0.001)
        np.testing.assert_allclose(receipt.norm[layer], np.linalg.norm(change_), rtol=1e-4)


def test_where_of_pictures(model, mixed):
    """Tiles, rows and columns of the vision tower, of two pictures in a row."""
    asked = {"x": mj.keep(S.vision.mlp.out)}
    before = np.asarray(mj.run(model, mixed, None, asked, logits="none")["x"])
    tiles, grid = np.array([0, 1, *[0] * 7])[:, None], np.arange(17) - 1
    real = mixed.is_real_tile[:, None]
    for where, want in [
        (tok.tile(1), tiles == 1),
        (tok.row(2), (grid >= 0) & (grid // 4 == 2)),
        (tok.column(3), (grid >= 0) & (grid % 4 == 3)),
        (tok.cls, grid < 0),
        (tok.image & tok.tile(0), (tiles == 0) & (grid >= 0)),
    ]:
        edit = mj.add(S.vision.mlp.out, 1.0, where=where)
        out = mj.run(model, mixed, edit, asked, logits="none")
        changed = (np.asarray(out["x"]) - before).round(5)[0, ..., 0]
        np.testing.assert_array_equal(changed, want & real & np.ones(17, bool))
        assert out.receipts[0].tokens[0] == changed.sum() > 0


def test_masks_of_pictures_are_by_tile_or_by_row(model, mixed):
    """Of 9 tiles, two of them the first row's, none the second's; by row there are two places."""
    asked = {"x": mj.keep(S.vision.mlp.out)}
    before = np.asarray(mj.run(model, mixed, None, asked, logits="none")["x"])
    by_row = np.random.default_rng(0).random((8, 2, 17)) < 0.5
    by_tile = np.concatenate([by_row[0], by_row[2:, 0], by_row[1, :1]])
    want = by_tile & mixed.is_real_tile[:, None]
    for mask in (by_tile, by_row):
        edit = mj.add(S.vision.mlp.out, 1.0, where=mask)
        out = mj.run(model, mixed, edit, asked, logits="none")
        changed = (np.asarray(out["x"]) - before).round(5)[0, ..., 0]
        np.testing.assert_array_equal(changed, want)
    for mask in (by_tile[:8], by_row[:7], by_row[..., :16]):
        with pytest.raises(
            ValueError, match=r"tokens \(9, 17\) by tile or \(8, tiles of a row, 17"
        ):
            mj.run(model, mixed, mj.add(S.vision.mlp.out, 1.0, where=mask))
    with pytest.raises(ValueError, match="1 tiles per row, the batch has 2"):
        mj.run(model, mixed, mj.add(S.vision.mlp.out, 1.0, where=by_row[:, :1]))


def test_a_mask_that_may_be_by_row_or_by_tile_is_refused(model, mixed):
    """As many tiles as rows, but not one each."""
    some = mixed.replace(
        tile=mixed.tile[:8], is_real_tile=mixed.is_real_tile[:8], pixels=mixed.pixels[:8]
    )
    mask = np.ones((8, 17), bool)
    with pytest.raises(ValueError, match="may be by row or by tile, which differ in this batch"):
        mj.run(model, some, mj.add(S.vision.mlp.out, 1.0, where=mask))


# Logits: of what a pass computes.


def test_a_patch_of_logits_reads_the_token_that_is_matched(model, batch, clean):
    """The last token of a row of 15 tokens is matched with that of one of 12."""
    last = clean[batch.tokens.last]
    out = mj.run(model, batch, mj.patch(S.logits, 0, 1, where=tok.last))
    np.testing.assert_allclose(out.logits[1], last[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.delete(out.logits, 1, 0), np.delete(last, 1, 0), atol=1e-5)
    assert out.receipts[0].tokens[0] == 1
    # The first of two tokens that are chosen is the last of its row alone in the source.
    where = tok.last.mask(batch.tokens) & (np.arange(B) != 0)[:, None]
    where[0, [3, 14]] = where[1, 2] = True
    for edit in (mj.patch(S.logits, 0, 1, where=where), mj.patch(S.logits, 1, 0, where=where)):
        every, _ = logits(model, batch, edit)
        out = mj.run(model, batch, edit)
        np.testing.assert_allclose(out.logits, every[batch.tokens.last], rtol=0, atol=1e-5)
        assert abs(out.logits - last).max() > 1e-3 and out.receipts[0].tokens[0] == 1
    where[0] = np.isin(np.arange(T), [14, 3]) & True
    where[1] = np.isin(np.arange(T), [0, batch.last[1]])
    where[0, 14], where[0, 7] = False, True  # matched with token 7 now
    with pytest.raises(ValueError, match=r"matches token 11 of row 1 with token 7 of row 0, whose"):
        mj.run(model, batch, mj.patch(S.logits, 0, 1, where=where))
    every, _ = logits(model, batch, mj.patch(S.logits, 0, 1, where=where))
    np.testing.assert_allclose(every[1, 11], clean[0, 7], rtol=0, atol=1e-5)
    with jax.disable_jit(False):  # where it cannot be refused it copies nothing
        run_ = jax.jit(lambda row: mj.run(model, batch, mj.patch(S.logits, row, 1, where=where)))
        out = run_(0)
    np.testing.assert_allclose(out.logits, last, rtol=0, atol=1e-5)
    assert not out.receipts[0].tokens.any()


@pytest.mark.parametrize("edit", [mj.add(S.logits, 1.0, where=tok.image),
                                  mj.patch(S.logits, 0, 2, where=tok.image)])  # fmt: skip
def test_an_edit_of_logits_that_are_not_computed_is_refused(edit, model, batch):
    said = "computes the logits of each row's last token only"
    with pytest.raises(ValueError, match=said):
        mj.run(model, batch, edit)
    with pytest.raises(ValueError, match=said):
        mj.sweep(lambda out: out.logits, model, batch, [edit, edit])
    with pytest.raises(ValueError, match=said):
        mj.generate(model, batch, edit, max_new_tokens=3)
    with pytest.raises(ValueError, match=said):
        mj.score(model, batch, np.ones((B, 1, 2), np.int32), edit)
    with pytest.raises(ValueError, match=said):
        mj.run(model, batch, None, {"x": mj.keep(S.logits, where=tok.image)})
    got, (receipt,) = logits(model, batch, edit)
    assert receipt.tokens[0] > 0


# Weights.


def test_ablating_a_neuron_is_zeroing_its_row_of_the_down_map(model, random_model, pictures):
    neurons = {"lm": (2, 7), "vision": (0, 11), "projector": (0, 20)}
    for module, (layer, unit) in neurons.items():
        changed = random_model(model.config)
        if module == "projector":
            kernel = changed.projector.linears[1].kernel
            kernel[...] = kernel[...].at[unit].set(0)
            address = S.projector.act[0, unit]
        else:
            kernel = getattr(changed, module).layers.mlp.down.kernel
            kernel[...] = kernel[...].at[layer, unit].set(0)
            address = getattr(S, module).mlp.act[layer, unit]
        got, (receipt,) = logits(model, pictures, mj.ablate(address))
        want, _ = logits(changed, pictures, None)
        valid = pictures.valid
        np.testing.assert_allclose(got[valid], want[valid], rtol=0, atol=1e-5)
        assert receipt.elements[layer] > 0


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_value_beyond_float16_is_refused(xp):
    """Arrays of JAX became infinite."""
    value, address = xp.full(32, 7e4, xp.float32), S.Address.of(RESID)
    with pytest.raises(ValueError, match="a value of 7e.04 is infinite in the site's dtype float1"):
        fit_value(value, address, S.SiteShape(L, (2, 15, 32), np.float16))
    fit_value(value, address, S.SiteShape(L, (2, 15, 32), jnp.bfloat16))


def test_a_basis_is_made_orthonormal_in_float32():
    shape = {"lm.resid_post": S.SiteShape(L, (2, 15, 32), jnp.bfloat16)}
    map_ = tok.TokenMap.grid(np.zeros(2, int), (3, 5), False, np.ones(2, bool))
    (bound,) = binding.bind_edits(mj.project_out(RESID, V), shape, {"lm": map_})
    basis = np.asarray(bound.values["basis"][1, :, 0], np.float32)
    assert bound.values["basis"].dtype == jnp.float32
    np.testing.assert_allclose(abs(basis), abs(V) / np.linalg.norm(V), rtol=1e-5)


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mj.ablate(S.lm.mlp.act[9]), "lm.mlp.act: layer 9 is out of range: the model has 3"),
        (lambda: mj.ablate(S.vision.mlp.act[2]), "vision.mlp.act: layer 2 .* feature layer never"),
        (lambda: mj.ablate(S.lm.mlp.act[1, 48]), "lm.mlp.act: unit 48 is out of range"),
        (lambda: mj.ablate(np.ones((4, 5), bool)), r"lm.mlp.act: the mask is \(4, 5\), the model "),
        (lambda: mj.ablate(S.lm.resid_post, where=np.ones((2, 3), bool)), r"mask is \(2, 3\), but the b"),
        (lambda: mj.ablate(S.lm.resid_post, where=tok.answer),
         r"the edit of lm.resid_post selects no token of this batch \(see where=\)"),
        (lambda: mj.ablate(S.lm.mlp.act[1, []]), "the edit of lm.mlp.act selects no layer or unit"),
        (lambda: mj.ablate(S.lm.mlp.act[5:]), "the edit of lm.mlp.act selects no layer or unit"),
        (lambda: mj.knockout(S.lm.attn, to=tok.last, on=tok.answer), "selects no token"),
        (lambda: mj.add(S.lm.resid_post, np.ones(31)),
         r"lm.resid_post: a value of shape \(31,\) does not fit; the site is "
         r"\[L B T D\] = \[3, 8, 15, 32\]"),
        (lambda: mj.scale(S.lm.mlp.act[1, [3, 5]], np.ones(3)), r"shape \(3,\) does not fit"),
        (lambda: mj.add(S.lm.resid_post[1:3], np.ones((2, 32))), r"shape \(2, 32\) does not fit"),
        (lambda: mj.add(S.lm.mlp.act[1, [3, 5, 3]], [1.0, 2.0, 4.0]), "unit 3 is listed twice with"),
        (lambda: mj.scale(S.lm.mlp.act[1, [3, -45]], [1.0, 2.0]), "lm.mlp.act: unit 3 is listed tw"),
        (lambda: mj.project_out(S.lm.resid_post, np.ones((31, 2))),
         r"lm.resid_post: the basis is \(31, 2\), expected \[32, directions\]"),
        (lambda: mj.project_out(S.lm.resid_post, np.ones((32, 2))),
         "lm.resid_post: the 2 directions of the basis span only 1"),
        (lambda: mj.project_out(S.lm.resid_post, np.zeros(32)), "span only 0"),
        (lambda: mj.project_out(S.lm.resid_post, jnp.zeros(32)), "span only 0"),
        (lambda: mj.project_out(S.lm.resid_post, jnp.ones((32, 2), jnp.bfloat16)), "span only 1"),
        (lambda: mj.patch(S.lm.resid_post, 0, 8), "writes row 8: the batch has rows 0 to 7"),
        (lambda: mj.patch(S.lm.resid_post, [0, 2], [4, 4]), r"writes a row twice: \[4, 4\]"),
        (lambda: mj.patch(S.lm.resid_post, 0, 1),
         "the patch of lm.resid_post matches 15 tokens of row 0 with 12 of row 1"),
        (lambda: mj.patch(S.lm.resid_post, 0, 1, where=np.eye(8, 15, dtype=bool)[:, ::-1]),
         "matches 1 tokens of row 0 with 0 of row 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(make, message, model, pictures):
    with pytest.raises(ValueError, match=message) as caught:
        mj.run(model, pictures, make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mj.knockout(S.lm.resid_post),
            "knockout does not apply to lm.resid_post: only lm.attn",
        ),
        (lambda: mj.ablate(S.lm.attn), "ablate does not apply to lm.attn.mask"),
        (lambda: mj.patch(S.lm.attn.pattern, 0, 1), "patch does not apply to lm.attn.pattern"),
        (lambda: mj.per_step(mj.ablate(RESID), 2.0), r"strengths \[steps\], got shape \(\)"),
        (lambda: mj.per_step(mj.knockout(S.lm.attn), [1.0]), "a knockout has no strength"),
        (
            lambda: mj.per_step(mj.per_step(mj.ablate(RESID), [1.0]), [1.0]),
            "the ablate of lm.resid_post already has strengths",
        ),
    ],
)
def test_kinds_have_their_sites_and_shapes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pass_without_the_site(model, make_batch):
    text = make_batch(images=(0, 0))
    with pytest.raises(
        ValueError, match=r"this pass has no site vision.mlp.act; it has: lm\.embed"
    ):
        mj.run(model, text, mj.ablate(S.vision.mlp.act))
