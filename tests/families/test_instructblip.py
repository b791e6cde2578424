"""InstructBLIP is HF's, at every site: EVA, Q-Former, projection, language model."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.instructblip import model as instructblip
from mllm_jax.interventions import edits, tap
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.loading import load
from tests.helpers import hf, random_inputs, tiers

SITES = (
    "vision.embed", "vision.resid_pre", "vision.attn.pattern", "vision.attn.heads",
    "vision.attn_out", "vision.mlp.act", "vision.mlp.out", "vision.resid_post",
    "qformer.attn.pattern", "qformer.mlp.act", "qformer.query_mlp.act", "qformer.resid_post",
    "projector.out", "lm.embed", "lm.resid_pre", "lm.attn.pattern", "lm.attn.heads", "lm.attn_out",
    "lm.resid_mid", "lm.mlp.gate", "lm.mlp.act", "lm.mlp.gated", "lm.mlp.out", "lm.resid_post",
    "lm.norm", "logits",
)  # fmt: skip
TINY = instructblip.InstructBlipConfig.tiny()
LAST = TINY.qformer.layers - 1
CONFIGS = {
    "every second": TINY,
    "every third of five, tanh": dataclasses.replace(
        TINY,
        vision=dataclasses.replace(TINY.vision, act="gelu_tanh", eps=1e-3),
        qformer=dataclasses.replace(
            TINY.qformer, layers=5, look_every=3, queries=3, act="relu", eps=1e-3
        ),
    ),
}


@functools.cache
def saved(name: str) -> tuple[hf.transformers.InstructBlipForConditionalGeneration, str]:
    """A random network of theirs, and where it was saved."""
    network = hf.transformers.InstructBlipForConditionalGeneration(
        hf.instructblip_config(CONFIGS[name])
    )
    directory = tempfile.mkdtemp()
    hf.random(network).save_pretrained(directory)
    return network, directory


@functools.cache
def pair(name: str = "every second"):
    network, directory = saved(name)
    return network, load.read_model(load.locate(directory), dtype=jnp.float32)


def told(batch, config, words=(7, 4, 6, 9)):
    """A batch with a text for the Q-Former: for each image one, of these lengths in turn."""
    rng = np.random.default_rng(len(batch.is_real_tile))
    lengths = np.resize(words, len(batch.is_real_tile)) * batch.is_real_tile
    kind = np.full((len(lengths), max(words)), tok.CODE["question"], np.int8)
    kind[:, 0] = tok.CODE["system"]
    kind[np.arange(max(words)) >= lengths[:, None]] = tok.CODE["pad"]
    ids = rng.integers(1, config.qformer.vocab, kind.shape, dtype=np.int32)
    return batch.replace(qformer_ids=np.where(kind > 0, ids, 0), qformer_kind=kind)


def inputs(batch) -> dict[str, np.ndarray]:
    """A batch as HF takes it."""
    return {
        "input_ids": batch.ids.astype(int),
        "attention_mask": batch.valid.astype(int),
        "pixel_values": batch.pixels.transpose(0, 3, 1, 2),
        "qformer_input_ids": batch.qformer_ids.astype(int),
        "qformer_attention_mask": (batch.qformer_kind > 0).astype(int),
    }


@pytest.fixture(scope="module")
def batch(make_batch):
    """Two pictures in the first row and one in the second; the last only fills the batch."""
    return told(make_batch(TINY, images=(2, 1), words=(6, 9), fill=1), TINY)


@pytest.mark.parametrize("pad", tiers.slow_except(["right"], ["right", "left"]))
@pytest.mark.parametrize("name", CONFIGS)
def test_every_site(name, pad, make_batch):
    theirs, ours = pair(name)
    assert ours.config == CONFIGS[name]
    batch = make_batch(ours.config, images=(2, 1, 1), words=(6, 12, 5), pad=pad, length=20)
    batch = told(batch, ours.config)
    asked = inputs(batch) | {"position_ids": batch.position.astype(int)}
    want = hf.tensors(theirs, SITES, **asked)
    assert len(want["qformer.mlp.act"]) == ours.config.qformer.layers
    hf.assert_equal(ours, batch, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_where_the_queries_look(name, make_batch):
    theirs, ours = pair(name)
    every = ours.config.qformer.look_every
    batch = told(make_batch(ours.config, images=(2, 1), words=(6, 12)), ours.config)
    asked = inputs(batch) | {"position_ids": batch.position.astype(int)}
    want = hf.tensors(theirs, ["qformer.cross.pattern"], **asked)["qformer.cross.pattern"]
    out = mj.run(ours, batch, None, {
        "pattern": mj.keep(S.qformer.cross.pattern),
        "map": mj.attention_map(S.qformer.cross.pattern),
        "mass": mj.mass(S.qformer.cross.pattern, by=tok.kind),
        "lm": mj.attention_map(S.lm.attn.pattern),
    }, logits="none")  # fmt: skip
    got = np.asarray(out["pattern"])
    assert len(got) == ours.config.qformer.layers and len(want) == -(-len(got) // every)
    np.testing.assert_allclose(got[::every], want, rtol=0, atol=1e-5)
    assert not np.delete(got, np.s_[::every], 0).any()
    maps, side = out["map"].maps(0), ours.config.vision.grid
    assert set(maps) == {0, 1} and maps[1].shape == (*got.shape[:1], got.shape[2], side, side)
    patches = got[:, 1, :, :, 1:].mean(2).reshape(maps[1].shape)  # CLS comes before the patches
    np.testing.assert_allclose(maps[1], patches, rtol=0, atol=1e-6)
    assert out["mass"].kinds == ("cls", "image")
    np.testing.assert_allclose(
        np.asarray(out["mass"].values)[::every].sum(-1), 1, rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="qformer.cross.pattern for their attention to patches"):
        out["lm"].maps(0)


def test_an_edit_of_where_queries_look_counts_only_where_they_do():
    ours = pair()[1]
    batch = told(random_inputs.make_batch(TINY, images=(1,), words=(6,)), TINY)
    clean = mj.run(ours, batch).logits
    out = mj.run(ours, batch, mj.replace(S.qformer.cross.pattern, 0.5))
    (receipt,) = out.receipts
    looks = np.arange(TINY.qformer.layers) % TINY.qformer.look_every == 0
    np.testing.assert_array_equal(np.asarray(receipt.tokens) > 0, looks)
    assert np.abs(np.asarray(out.logits) - clean).max() > 1e-3
    nowhere = mj.run(ours, batch, mj.replace(S.qformer.cross.pattern[1], 0.5))
    np.testing.assert_allclose(nowhere.logits, clean, atol=1e-6)
    assert not np.asarray(nowhere.receipts[0].tokens).any()


@pytest.mark.parametrize("pad", tiers.slow_except(["right"], ["right", "left"]))
def test_greedy_generation(pad, make_batch):
    theirs, ours = pair()
    there, here = (
        told(make_batch(TINY, images=(1,) * 3, words=(12, 5, 9), pad=p), TINY)
        for p in ("left", pad)
    )
    given = {name: hf.torch.from_numpy(array) for name, array in inputs(there).items()}
    want = theirs.generate(
        **given, do_sample=False, max_new_tokens=32, eos_token_id=None, pad_token_id=0
    )
    got = mj.generate(ours, here, max_new_tokens=32).tokens
    np.testing.assert_array_equal(got, want[:, -32:].numpy())
    assert len(np.unique(got)) > 10  # it says something


def test_a_row_alone_is_the_row_in_its_batch(batch, make_batch):
    _, ours = pair()
    alone = make_batch(TINY, images=(2,), words=(6,))
    alone = alone.replace(qformer_ids=batch.qformer_ids[:2], qformer_kind=batch.qformer_kind[:2])
    asked = {name: mj.keep(S.get(name)) for name in ("qformer.resid_post", "projector.out")}
    whole, row = (mj.run(ours, b, None, asked) for b in (batch, alone))
    np.testing.assert_allclose(whole.logits[0], row.logits[0], rtol=0, atol=1e-5)
    for name in asked:
        real = S.get(name).entry(ours.token_maps(alone)).kind > 0
        a, b = (np.asarray(out[name])[..., :2, :, :][..., real, :] for out in (whole, row))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_text_matters_and_its_padding_does_not(batch):
    _, ours = pair()
    ids, kind = batch.qformer_ids, batch.qformer_kind
    first = np.argsort(kind > 0, 1, stable=True)  # padding comes first
    swapped = [1, 0, *range(2, ids.shape[1])]
    texts = {
        "as it is": (ids, kind),
        "garbled padding": (np.where(kind > 0, ids, 7), kind),
        "padding first": [np.take_along_axis(a, first, 1) for a in (ids, kind)],
        "other words": (np.where(kind > 0, ids % 50 + 3, 0), kind),
        "other order": (ids[:, swapped], kind),
    }
    clean, garbled, moved, *others = (
        np.asarray(mj.run(ours, batch.replace(qformer_ids=i, qformer_kind=k)).logits)
        for i, k in texts.values()
    )
    np.testing.assert_array_equal(garbled, clean)
    np.testing.assert_allclose(moved, clean, rtol=0, atol=1e-5)
    for other in others:
        assert (np.abs(other - clean).max(-1) > 1e-3).all()


def test_features_stand_in_for_pixels(batch):
    _, ours = pair()
    features = jax.jit(lambda m, b: m.features(b, tap.Taps()))(ours, batch)
    assert features.shape == (4, TINY.vision.feature_tokens, TINY.vision.width)
    given = batch.replace(features=features, pixels=np.zeros_like(batch.pixels))
    a, b = (mj.run(ours, x).logits for x in (batch, given))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_text_alone(make_batch):
    theirs, ours = pair()
    batch = make_batch(TINY, images=(0, 0), words=(9, 9))
    with hf.torch.no_grad():
        want = theirs.language_model(hf.torch.from_numpy(batch.ids)).logits
    got = mj.run(ours, batch, logits="all").logits
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4)
    assert not any(name.startswith("qformer") for name in site_shapes(ours, batch))


def test_a_batch_without_a_text_for_the_qformer(make_batch):
    with pytest.raises(ValueError, match="this batch has no text for the Q-Former"):
        mj.run(pair()[1], make_batch(TINY))


# Interventions.

WORDS = 7 + 4 + 6  # of the Q-Former's texts, their first words not of the question
CHANGES = {  # where, which layers, which tokens, how many those are
    "vision.embed": (S.vision.embed[[0, 1]], tok.every, 3 * 17),
    "vision.mlp.act": (S.vision.mlp.act[-1], tok.every, 3 * 17),
    "vision.resid_post": (S.vision.resid_post[1], tok.image, 3 * 16),
    "qformer.mlp.act": (S.qformer.mlp.act[LAST - 1, ::2], tok.question, WORDS - 3),
    "qformer.query_mlp.act": (S.qformer.query_mlp.act[LAST, [3, 4]], tok.query, 3 * 5),
    "queries": (S.qformer.resid_post[LAST], tok.query, 3 * 5),
    "text": (S.qformer.resid_post[0], tok.text, WORDS),
    "projector.out": (S.projector.out, tok.image, 3 * 5),
    "dead neurons": (S.qformer.mlp.act[LAST], tok.every, WORDS),
    "dead text": (S.qformer.resid_post[LAST], tok.text, WORDS),
}


def chain(**strengths) -> edits.Edits:
    """All of them, one program: those that are not named do nothing."""
    all_ = [mj.scale(at, strengths.get(name, 1.0), where=where)
             for name, (at, where, _) in CHANGES.items()]  # fmt: skip
    return functools.reduce(operator.rshift, all_)


@pytest.fixture(scope="module")
def clean(batch):
    return mj.run(pair()[1], batch, chain())


@pytest.mark.parametrize("name", CHANGES)
def test_an_edit_changes_the_logits_unless_it_is_of_the_dead(name, batch, clean):
    """The receipt tells what was matched and changed in any case."""
    out = mj.run(pair()[1], batch, chain(**{name: -2.0}))
    receipt = out.receipts[list(CHANGES).index(name)]
    assert receipt.tokens.max() == CHANGES[name][2]
    assert receipt.elements.sum() > 0 and receipt.norm.max() > 0.1
    change = np.abs(out.logits - clean.logits).max(-1)
    assert (change == 0).all() if "dead" in name else (change > 1e-3).all()


@pytest.mark.slow
def test_text_neurons_of_the_last_layer_are_dead(batch, clean):
    """To ablate them is exactly nothing; the receipt says how many were matched all the same."""
    _, ours = pair()
    one, all_ = (mj.run(ours, batch, mj.ablate(S.qformer.mlp.act[LAST, n])) for n in (0, None))
    np.testing.assert_array_equal(all_.logits, one.logits)
    np.testing.assert_allclose(all_.logits, clean.logits, rtol=0, atol=1e-6)  # another program
    assert all_.receipts[0].tokens.tolist() == [0] * LAST + [WORDS]
    assert all_.receipts[0].elements.tolist() == [0] * LAST + [WORDS * TINY.qformer.mlp]

    @jax.jit
    @jax.grad
    def slope(gates):
        out = mj.run(ours, batch, mj.scale(S.qformer.mlp.act, gates))
        return jnp.sum(out.logits**2)

    slopes = np.asarray(slope(np.ones((LAST + 1, TINY.qformer.mlp), np.float32)))
    assert not slopes[LAST].any() and all(slopes[layer].any() for layer in range(LAST))


def test_statistics_by_kind_are_those_of_the_values(batch):
    _, ours = pair()
    names = ("qformer.mlp.act", "qformer.query_mlp.act", "qformer.resid_post")
    asked = {name: mj.stats(S.get(name), by=tok.kind) for name in names}
    kept = {f"{name} kept": mj.keep(S.get(name)) for name in asked}
    out = mj.run(ours, batch, None, asked | kept)
    for name in asked:
        values, kind = out[f"{name} kept"], S.get(name).entry(ours.token_maps(batch)).kind
        for i, k in enumerate(out[name].kinds):
            some = np.asarray(values)[:, kind == tok.CODE[k]]
            np.testing.assert_array_equal(out[name].positive[..., i], (some > 0).sum(1))
            np.testing.assert_allclose(out[name].sum[..., i], some.sum(1), rtol=0, atol=1e-4)
            assert set(out[name].tokens[:, i].tolist()) == {some.shape[1]}
    kinds = {name: out[name].kinds for name in asked}
    assert kinds == {
        "qformer.mlp.act": ("system", "question"),
        "qformer.query_mlp.act": ("query",),
        "qformer.resid_post": ("query", "system", "question"),
    }
    with pytest.raises(ValueError, match="by=image: kinds of qformer tokens are query"):
        mj.stats(S.qformer.query_mlp.act, by="image")


@pytest.mark.slow
def test_a_sweep_over_layers_is_a_loop(batch):
    _, ours = pair()
    swept = [mj.ablate(S.qformer.query_mlp.act[layer, [1, 2]]) for layer in range(LAST + 1)]
    got = mj.sweep(last, ours, batch, swept)
    want = [mj.run(ours, batch, edit).logits for edit in swept]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def last(out):
    return out.logits


# The real one.


def test_sizes_of_the_real_one(make_batch):
    """Neurons by module, and 1 % of them, as paper A selects (facts of its table)."""
    config = instructblip.InstructBlipConfig.vicuna_7b()
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    batch = told(make_batch(config, images=(1,), words=(8,)), config)
    shapes = site_shapes(model, batch)
    found = {}
    for name in ("lm.mlp.act", "vision.mlp.act", "qformer.mlp.act", "qformer.query_mlp.act"):
        neurons = shapes[name].layers * shapes[name].shape[-1]
        found[name] = (neurons, round(0.01 * neurons))
    assert found == {
        "lm.mlp.act": (352_256, 3523),
        "vision.mlp.act": (239_616, 2396),
        "qformer.mlp.act": (36_864, 369),
        "qformer.query_mlp.act": (36_864, 369),
    }
    assert shapes["vision.mlp.act"].shape == (1, 257, 6144)
    assert shapes["qformer.query_mlp.act"].shape == (1, 32, 3072)
    assert shapes["projector.out"].shape == (1, 32, 4096)
    with hf.torch.device("meta"):
        theirs = hf.transformers.InstructBlipForConditionalGeneration(
            hf.instructblip_config(config)
        )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    assert count == sum(p.numel() for p in theirs.parameters()) == 7_913_210_624


@pytest.mark.slow
def test_bfloat16_is_as_near_as_theirs(make_batch):
    network, directory = saved("every second")
    batch = make_batch(TINY, images=(1,) * 12, words=(40,) * 12, seed=3)
    batch = told(batch, TINY)
    given = {name: hf.torch.from_numpy(array) for name, array in inputs(batch).items()}
    half = type(network).from_pretrained(
        directory, dtype=hf.torch.bfloat16, attn_implementation="eager"
    )
    with hf.torch.no_grad():
        want, theirs = (n(**given).logits.float().numpy()[batch.valid] for n in (network, half))
    model = load.read_model(load.locate(directory), dtype=jnp.bfloat16)
    ours = np.asarray(mj.run(model, batch, logits="all").logits)[batch.valid]
    (near, same), (nearest, sames) = hf.distance(ours, want), hf.distance(theirs, want)
    assert nearest > 1e-6  # theirs is not exact either
    assert near <= 1.5 * nearest and same <= 1.5 * sames
