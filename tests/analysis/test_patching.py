"""Attribution patching, exact patches, corrupt pictures and circuits, against algebra and loops."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import attribution, circuits, corruption, edges, patching, paths
from mllm_jax.analysis.contrasts import Contrast
from mllm_jax.analysis.paths import Path
from mllm_jax.dictionaries.dictionary import Dictionary
from tests.helpers import contrasts, random_inputs

SITES = [S.lm.embed, S.lm.resid_post, S.lm.attn.heads, S.lm.attn_out, S.lm.attn.v]


@pytest.fixture(scope="module")
def linear():
    return contrasts.contrast(contrasts.linear_model())


@pytest.fixture(scope="module")
def tiny():
    return contrasts.contrast(random_inputs.random_model(contrasts.tiny_config()))


@pytest.fixture(scope="module")
def nearly():
    """Clean and corrupt pictures that hardly differ: every effect is of first order."""
    return contrasts.contrast(random_inputs.random_model(contrasts.tiny_config()), scale=1e-2)


def test_of_a_linear_model_attributions_are_the_exact_patches(linear):
    found = patching.attribute(linear, [*SITES, *SITES])  # a site counts once
    everywhere = np.ones(linear.clean.ids.shape, bool)  # by the tokens of the clean batch
    heads = patching.exact(linear, S.lm.attn.heads, over=("layer", "unit"), where=everywhere)[
        :, :, 0
    ]
    assert np.abs(heads).max() > 0.02
    np.testing.assert_allclose(found.values["lm.attn.heads"].sum(2), heads, rtol=1e-3, atol=5e-5)
    total = found.values["lm.embed"].sum(1)
    np.testing.assert_allclose(total, found.clean - found.corrupt, rtol=1e-3, atol=5e-5)


@pytest.mark.slow
def test_of_a_linear_model_integrated_gradients_and_edges_are_exact_too(linear):
    first, integrated = (patching.attribute(linear, SITES, steps=steps) for steps in (0, 2))
    for name, values in first.values.items():
        np.testing.assert_allclose(integrated.values[name], values, rtol=1e-3, atol=5e-5)
    resid = patching.exact(linear, S.lm.resid_post, over=("layer", "token"))
    np.testing.assert_allclose(first.values["lm.resid_post"], resid, rtol=1e-3, atol=5e-5)
    found = edges.attribute(linear)
    _compare_edges(linear, found, [("head", "v"), ("head", "output")], share=1e-2)
    np.testing.assert_allclose(edges.attribute(linear, steps=2).values, found.values, atol=5e-5)
    # What the parts add directly is all of the difference.
    total = found.values[..., -1].sum(1)
    np.testing.assert_allclose(total, first.clean - first.corrupt, rtol=1e-3, atol=5e-5)
    (u, v, value), *_ = found.top(1)
    assert found.is_edge[found.senders.index(u), found.receivers.index(v)] and value


TARGETS = {
    "embed": lambda node: S.lm.embed,
    "head": lambda node: S.lm.attn.heads[node.layer, [node.unit]],
    "mlp": lambda node: S.lm.mlp.out[node.layer],
    "q": lambda node: S.lm.attn.q[node.layer, [node.unit]],
    "k": lambda node: S.lm.attn.k[node.layer, [node.unit]],
    "v": lambda node: S.lm.attn.v[node.layer, [node.unit]],
    "output": lambda node: S.lm.resid_post[-1],
}


def _compare_edges(contrast, found, pairs, share, every=3):
    """Compare every third edge between these parts with the exact path.

    They are equal up to a share of the largest effect.
    """
    for parts in pairs:
        chosen = [
            (u, v)
            for u, v in np.argwhere(found.is_edge).tolist()
            if (found.senders[u].part, found.receivers[v].part) == parts
        ][::every]
        nodes = [(found.senders[u], found.receivers[v]) for u, v in chosen]
        asked = [Path(TARGETS[a.part](a), TARGETS[b.part](b)) for a, b in nodes]
        want = paths.effect(contrast, asked)
        got = np.stack([found.values[:, u, v] for u, v in chosen])
        largest = np.abs(want).max()
        assert largest > 1e-5, parts
        np.testing.assert_allclose(got, want, rtol=0, atol=share * largest)


@pytest.mark.slow
@pytest.mark.long
def test_edges_hold_under_the_edits_of_the_contrast(nearly):
    """In receivers: queries, MLPs and their neurons; and where a sender adds."""
    edits = mj.scale(S.lm.attn.q[1:], 3.0) >> mj.ablate(S.lm.attn.heads[0, [1]])
    edits >>= mj.ablate(S.lm.mlp.act[1]) >> mj.scale(S.lm.mlp.gated[2], 3.0, where=tok.text)
    edits >>= mj.scale(S.lm.mlp.out[2], -2.0) >> mj.add(S.lm.resid_post[1], np.ones(32))
    contrast = spliced(nearly, edits)
    found = edges.attribute(contrast)
    assert not found.values[..., found.receivers.index(edges.Node(1, "mlp"))].any()
    _compare_edges(contrast, found, [("head", "q"), ("head", "mlp")], share=2e-2)


@pytest.mark.parametrize("edit, match", [
    (mj.ablate(S.lm.resid_mid[0]), "no ablate of lm.resid_mid"),
    (mj.scale(S.lm.attn_out, 2.0), "no scale of lm.attn_out"),
])  # fmt: skip
def test_edges_refuse_edits_between_sender_and_receiver(nearly, edit, match):
    with pytest.raises(ValueError, match=match):
        edges.attribute(spliced(nearly, edit))
    latents = mj.splice(S.lm.resid_post[0], dictionary(1)) >> mj.ablate(LATENTS[0, [3]])
    with pytest.raises(ValueError, match=r"no splice of lm.resid_post"):
        edges.attribute(spliced(nearly, latents))


@pytest.mark.slow
def test_neurons_send_by_way_of_their_own_mlp(tiny):
    """All of what enters the last map of an MLP sends what the MLP sends, to the logits."""
    out = S.lm.resid_post[-1]
    where = np.ones(tiny.clean.ids.shape, bool)  # by the tokens of the clean batch
    sent = [paths.effect(tiny, [Path(site[layer], out, where=where) for layer in range(3)])
            for site in (S.lm.mlp.gated, S.lm.mlp.out)]  # fmt: skip
    assert np.abs(sent[1]).min() > 1e-4
    np.testing.assert_allclose(*sent, rtol=0, atol=1e-5)


def test_parts_of_several_mlps_are_no_sender(tiny):
    with pytest.raises(ValueError, match="of layers 0 to 2.*one layer"):
        paths.effect(tiny, [Path(S.lm.mlp.act[[0, 2]], S.lm.resid_post[-1])])
    with pytest.raises(ValueError, match="not lm.mlp.out.latents"):
        paths.effect(tiny, [Path(S.lm.mlp.out.latents[0], S.lm.resid_post[-1])])


def test_a_metric_is_one_number_a_row(tiny):
    def mean(out):
        return out.logits[:, 3].mean()

    contrast = Contrast.of(mean, tiny.model, tiny.clean, tiny.corrupt)
    with pytest.raises(ValueError, match=r"shape \[\], expected \[2\]: one number for each row"):
        contrast.metric_of(tiny.clean)


def test_without_a_difference_there_is_nothing_to_recover():
    one = np.ones(2)
    found = circuits.Curves(np.array([1]), one[None], one[None], one[None], one[None], one, one)
    with pytest.raises(ValueError, match="no difference that a circuit could recover"):
        _ = found.faithfulness


def test_states_have_no_units(tiny):
    with pytest.raises(ValueError, match="of the whole state"):
        patching.exact(tiny, S.lm.resid_post[1, [0]])


def test_a_gate_has_a_precise_slope_in_a_narrow_dtype():
    """A large coordinate that is the same in both does not hide what differs."""
    x, closed = jnp.array([[256.0, 1.0], [256.0, 0.5]], jnp.bfloat16)
    slope = jax.grad(lambda gate: attribution.interpolate(x, gate, closed).sum())
    np.testing.assert_allclose(slope(jnp.ones((), jnp.bfloat16)), 0.5, rtol=1e-2)
    np.testing.assert_array_equal(attribution.interpolate(x, jnp.zeros(()), closed), closed)


def test_rows_that_fill_up_a_batch_do_not_count(tiny, monkeypatch):
    clean = tiny.clean.replace(tokens=jax.tree.map(np.copy, tiny.clean.tokens))
    clean.tokens.kind[1] = tok.CODE["pad"]
    contrast = dataclasses.replace(tiny, clean=clean)
    assert contrast.is_row.tolist() == [True, False]
    T = clean.ids.shape[1]
    values = {"lm.attn.heads": np.ones((3, 2, T, 4)), "lm.mlp.out": np.ones((3, 2, T))}
    effects = patching.Effects(values, np.ones(2), np.zeros(2))
    scores = circuits.node_scores(effects, contrast)
    assert (scores == np.asarray(clean.valid).sum()).all()

    def evaluate(contrast, lanes, kinds):
        return np.stack([lanes.sum((1, 2, 3)), np.zeros(len(lanes))], -1)

    monkeypatch.setattr(circuits, "evaluate", evaluate)
    mask = np.ones((1, 3, 5), bool)
    assert (circuits.minimality(contrast, mask) == 1).all()
    found = edges.EdgeEffects.of(
        np.ones((2, 16, 28)) * [[[1]], [[0]]], tiny.model.config.lm, contrast.is_row
    )
    assert found.top(1)[0][2] == 1


@pytest.mark.slow
@pytest.mark.long
def test_of_a_small_change_attributions_are_the_exact_patches(nearly):
    sites = [S.lm.resid_mid, S.lm.mlp.act, S.lm.mlp.out, S.lm.attn.k]
    found = patching.attribute(nearly, sites)
    for site, over in ((S.lm.resid_mid, ("layer", "token")), (S.lm.attn.k, ("layer", "unit")),
                       (S.lm.mlp.out, ("layer", "token"))):  # fmt: skip
        want = patching.exact(nearly, site, over=over)
        got = found.values[site.name]
        got = got if "token" in over else got.sum(2, keepdims=True)
        largest = np.abs(want).max()
        assert largest > 1e-5, site
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-2 * largest)
    pairs = [("mlp", "q"), ("head", "k"), ("head", "mlp")]
    _compare_edges(nearly, edges.attribute(nearly), pairs, share=5e-2, every=2)


@pytest.mark.slow
def test_exact_patches_are_those_of_a_loop(tiny):
    kept = {"z": mj.keep(S.lm.attn.heads), "x": mj.keep(S.lm.resid_post)}
    corrupt = mj.run(tiny.model, tiny.corrupt, None, kept)
    clean = np.asarray(tiny.metric(mj.run(tiny.model, tiny.clean)))
    heads = patching.exact(tiny, S.lm.attn.heads, over=("layer", "unit"), where=tok.image)
    resid = patching.exact(tiny, S.lm.resid_post, over=("layer", "token"))
    assert heads.shape == (3, 2, 1, 4) and resid.shape == (3, 2, tiny.clean.ids.shape[1])
    for layer, unit in ((0, 1), (2, 3)):
        value = np.asarray(corrupt["z"])[:, :, :, unit : unit + 1]
        edit = mj.replace(S.lm.attn.heads[layer, [unit]], value, where=tok.image)
        want = clean - tiny.metric(mj.run(tiny.model, tiny.clean, edit))
        np.testing.assert_allclose(heads[layer, :, 0, unit], want, rtol=0, atol=1e-5)
    for layer, token in ((0, 4), (1, tiny.clean.ids.shape[1] - 1)):
        at = np.arange(tiny.clean.ids.shape[1])[None] == token
        edit = mj.replace(S.lm.resid_post[layer], corrupt["x"], where=np.repeat(at, 2, 0))
        want = clean - tiny.metric(mj.run(tiny.model, tiny.clean, edit))
        np.testing.assert_allclose(resid[layer, :, token], want, rtol=0, atol=1e-5)
    assert not resid[:, 0, 0].any()  # padding


@pytest.mark.slow
@pytest.mark.long
def test_on_the_tiny_model_effects_are_complete_and_near_the_exact_ones(tiny):
    sites = [S.lm.embed, S.lm.attn.heads, S.vision.resid_post]
    found = patching.attribute(tiny, sites[:2], steps=64)
    total = found.values["lm.embed"].sum(1)
    np.testing.assert_allclose(total, found.clean - found.corrupt, rtol=2e-2, atol=2e-2)
    exact = patching.exact(tiny, S.lm.attn.heads, over=("layer", "unit"))[:, :, 0]
    heads = found.values["lm.attn.heads"].sum(2)
    assert np.corrcoef(exact.ravel(), heads.ravel())[0, 1] > 0.7
    # At a site of the tower, a slope: the difference quotient along the change.
    slope = patching.attribute(tiny, sites, where=None).values["vision.resid_post"]
    corrupt = mj.run(tiny.model, tiny.corrupt, None, {"x": mj.keep(S.vision.resid_post[0])})["x"]
    metric = []
    for gate in (1 - 1e-2, 1 + 1e-2):
        edit = mj.call(S.vision.resid_post[0], attribution.interpolate, gate=gate, closed=corrupt)
        metric.append(tiny.metric(mj.run(tiny.model, tiny.clean, edit)))
    want = (metric[1] - metric[0]) / 2e-2
    np.testing.assert_allclose(slope[0].sum(-1), want, rtol=2e-2, atol=1e-2)


@pytest.mark.slow
def test_circuits_go_from_corrupt_to_clean(tiny):
    kinds = ("image", "text")
    scores = circuits.node_scores(
        patching.attribute(tiny, circuits.NODE_SITES, steps=4), tiny, kinds=kinds
    )
    assert scores.shape == (2, 3, 5)
    sizes = (0, 6, 15, 30)
    found = circuits.curves(tiny, scores, sizes, kinds=kinds, draws=2)
    np.testing.assert_allclose(found.faithfulness[-1], 1, atol=1e-4)
    np.testing.assert_allclose(found.incompleteness[0], 1, atol=1e-4)
    np.testing.assert_allclose(found.circuit[0], found.complement[-1], atol=1e-5)
    np.testing.assert_allclose(found.random_circuit[:, [0, -1]], found.circuit[[0, -1]][None].repeat(2, 0), atol=1e-5)  # fmt: skip
    # A circuit of all heads and MLPs but two, by replacing these with what they are when corrupt.
    mask = np.ones((2, 3, 5), bool)
    mask[0, 1, 2] = mask[1, 2, 4] = False
    kept = {"z": mj.keep(S.lm.attn.heads), "m": mj.keep(S.lm.mlp.out)}
    corrupt = mj.run(tiny.model, tiny.corrupt, None, kept)
    edits = mj.replace(
        S.lm.attn.heads[1, [2]], np.asarray(corrupt["z"])[:, :, :, 2:3], where=tok.image
    ) >> mj.replace(S.lm.mlp.out[2], corrupt["m"], where=tok.text)
    want = tiny.metric(mj.run(tiny.model, tiny.clean, edits))
    (got,) = circuits.evaluate(tiny, mask[None], kinds=kinds)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    falls = circuits.minimality(tiny, mask, kinds=kinds)
    lesser = mask.copy()
    lesser[0, 0, 1] = False
    (less,) = circuits.evaluate(tiny, lesser[None], kinds=kinds)
    np.testing.assert_allclose(falls[0, 0, 1], (got - less).mean(), atol=1e-5)
    assert not falls[~mask].any()


def test_a_circuit_without_each_of_some_nodes():
    circuit = np.random.default_rng(0).random((2, 3, 4)) < 0.8
    nodes = circuit & (np.arange(4) < 2)
    lanes = circuits.without_each(circuit, nodes)
    places = np.argwhere(nodes)
    assert len(lanes) == len(places) > 1
    for lane, place in zip(lanes, places, strict=True):
        assert np.argwhere(circuit & ~lane).tolist() == [place.tolist()]
        assert not (lane & ~circuit).any()


LATENTS = S.lm.resid_post.latents


def dictionary(seed: int, width: int = 32, latents: int = 12) -> Dictionary:
    rng = np.random.default_rng(seed)
    encoder, decoder = rng.standard_normal((2, width, latents)).astype(np.float32)
    bias = rng.standard_normal(latents).astype(np.float32)
    return Dictionary(
        encoder=jnp.asarray(encoder), encoder_bias=jnp.asarray(bias),
        decoder=jnp.asarray(0.1 * decoder.T), decoder_bias=jnp.zeros(width),
    )  # fmt: skip


def spliced(contrast, edits):
    return dataclasses.replace(contrast, edits=contrast.edits >> edits)


@pytest.fixture(scope="module")
def two_spliced(linear):
    """Two dictionaries, not in the order of their layers."""
    layers = {1: dictionary(1), 0: dictionary(2)}
    first, second = (mj.splice(S.lm.resid_post[layer], of) for layer, of in layers.items())
    contrast = spliced(linear, first >> second)
    return layers, contrast, patching.attribute(contrast, [LATENTS], where=tok.image)


def test_of_a_linear_model_attributions_of_latents_are_exact(linear, two_spliced):
    layers, _, found = two_spliced
    kept = {"x": mj.keep(S.lm.resid_post)}
    x, other = (mj.run(linear.model, b, None, kept)["x"] for b in (linear.clean, linear.corrupt))

    def metric(add):
        out = mj.run(linear.model, linear.clean, mj.add(S.lm.resid_post, add))
        return linear.metric(out).sum()

    slope = np.asarray(jax.grad(metric)(jnp.zeros(x.shape)))
    image = np.asarray(tok.image.mask(linear.clean.tokens))[..., None]
    values = found.values[LATENTS.name]
    assert values.shape == (2, *image.shape[:2], 12)
    for number, (layer, of) in enumerate(layers.items()):
        z, closed = (
            np.maximum(np.asarray(a[layer]) @ np.asarray(of.encoder) + of.encoder_bias, 0)
            for a in (x, other)
        )
        want = (z - closed) * (slope[layer] @ np.asarray(of.decoder).T) * image
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(values[number], want, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_of_a_linear_model_exact_patches_of_latents_are_the_attributions(two_spliced):
    _, contrast, found = two_spliced
    some = LATENTS[0, [3, 7]]  # before the other dictionary, which must not hide what they do
    exact = patching.exact(contrast, some, over=("layer", "unit"), where=tok.image)
    assert exact.shape == (2, 2, 1, 12) and not exact[0].any()
    want = np.where(np.isin(np.arange(12), [3, 7]), found.values[LATENTS.name][1].sum(1), 0)
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(exact[1, :, 0], want, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_exact_patches_of_latents_are_those_of_a_loop_and_estimates_are_slopes(tiny):
    of = dictionary(3)
    contrast = spliced(tiny, mj.splice(S.lm.resid_post[1], of))
    kept = {"z": mj.keep(LATENTS)}
    closed = np.asarray(mj.run(tiny.model, tiny.corrupt, contrast.edits, kept)["z"])
    clean = np.asarray(tiny.metric(mj.run(tiny.model, tiny.clean)))
    found = patching.attribute(contrast, [LATENTS])
    np.testing.assert_array_equal(found.clean, clean)  # a splice without edits is clean
    T = tiny.clean.ids.shape[1]
    exact = patching.exact(contrast, LATENTS[1, [2, 9]], over=("token", "unit"))
    assert exact.shape == (1, 2, T, 12)
    for token, unit in ((T - 1, 2), (6, 9), (7, 2)):
        at = np.repeat(np.arange(T)[None] == token, 2, 0)
        edits = contrast.edits >> mj.replace(
            LATENTS[1, [unit]], closed[..., unit : unit + 1], where=at
        )
        want = clean - tiny.metric(mj.run(tiny.model, tiny.clean, edits))
        np.testing.assert_allclose(exact[0, :, token, unit], want, rtol=0, atol=1e-5)
        # The slope at a gate of 1 by a quotient.
        metric = []
        for gate in (1 - 1e-2, 1 + 1e-2):
            edits = contrast.edits >> mj.call(
                LATENTS[1, [unit]], attribution.interpolate, gate=gate, closed=closed, where=at
            )
            metric.append(np.asarray(tiny.metric(mj.run(tiny.model, tiny.clean, edits))))
        slope = found.values[LATENTS.name][0, :, token, unit]
        np.testing.assert_allclose(slope, (metric[1] - metric[0]) / 2e-2, rtol=2e-2, atol=2e-4)
    assert not exact[0, :, :, [0, 1, 11]].any()


def test_latents_without_a_splice_are_refused(linear):
    with pytest.raises(ValueError, match="no dictionary is spliced at lm.resid_post"):
        patching.attribute(linear, [LATENTS])
    with pytest.raises(ValueError, match="no dictionary is spliced at lm.resid_post"):
        patching.exact(linear, LATENTS, over=("unit",))
    one = spliced(linear, mj.splice(S.lm.resid_post[0], dictionary(1)))
    with pytest.raises(ValueError, match="what is selected has no dictionary"):
        patching.exact(one, LATENTS[2], over=("unit",))


def test_what_does_not_correspond_is_refused(linear):
    model, clean = linear.model, linear.clean
    other = random_inputs.make_batch(model.config, images=(1, 1), words=(8, 5), pad="left")
    with pytest.raises(ValueError, match="differ in the kind of lm token . of row 0"):
        Contrast.of(contrasts.METRIC, model, clean, other)
    longer = random_inputs.make_batch(model.config, images=(1, 1), words=(5, 9), pad="left")
    with pytest.raises(ValueError, match="make both with the same rows= and length="):
        Contrast.of(contrasts.METRIC, model, clean, longer)
    with pytest.raises(ValueError, match="a contrast takes no patch among its edits"):
        Contrast.of(contrasts.METRIC, model, clean, clean, mj.patch(S.lm.resid_post[0], 0, 1))
    with pytest.raises(ValueError, match="steps=1: integrated gradients run .* vision.resid_post"):
        patching.attribute(linear, [S.vision.resid_post], steps=1)
    with pytest.raises(ValueError, match="where= selects no token of this batch at lm.embed"):
        patching.attribute(linear, [S.lm.embed], where=tok.answer)
    with pytest.raises(ValueError, match="lm.attn.mask has no activations"):
        patching.attribute(linear, [S.lm.attn.mask])
    with pytest.raises(ValueError, match="over=unit: lm.resid_post is patched as a whole"):
        patching.exact(linear, S.lm.resid_post, over=("unit",))
    with pytest.raises(ValueError, match="of the language model, not vision.mlp.act"):
        patching.exact(linear, S.vision.mlp.act)
    with pytest.raises(ValueError, match="where= selects no token"):
        patching.exact(linear, S.lm.embed, over=("token",), where=tok.answer)
    with pytest.raises(ValueError, match="lm.attn.q of layer 1: the receiver must come after"):
        Path(S.lm.attn.heads[1, [0]], S.lm.attn.q[1, [0]]).edits(2, 3)
    with pytest.raises(ValueError, match="sites of the language model, not vision.embed"):
        Path(S.vision.embed, S.lm.mlp.out[0]).edits(2, 3)
    with pytest.raises(ValueError, match="kinds=image, every: a token belongs to several"):
        circuits.curves(linear, np.ones((2, 3, 5)), [1], kinds=("image", "every"))
    with pytest.raises(ValueError, match=r"sizes=\[16\]: there are 15 nodes"):
        circuits.curves(linear, np.ones((1, 3, 5)), [16])


def test_corrupt_pictures():
    make = random_inputs.make_batch
    batch = make(images=(1, 1, 0), words=(5, 8, 7), fill=1)
    noisy = corruption.noise(batch, scale=2.0)
    change = noisy.pixels - batch.pixels
    assert not change[2].any()
    spread = batch.pixels[:2].std()
    np.testing.assert_allclose(change[:2].std(), 2 * spread, rtol=0.05)
    assert (noisy.pixels == corruption.noise(batch, scale=2.0).pixels).all()
    assert (noisy.pixels[:2] != corruption.noise(batch, scale=2.0, seed=1).pixels[:2]).all()
    flat = corruption.mean(batch).pixels
    for tile in range(2):
        want = batch.pixels[tile].mean((0, 1))
        np.testing.assert_allclose(flat[tile], np.broadcast_to(want, flat[tile].shape), atol=1e-5)
    np.testing.assert_array_equal(flat[2], batch.pixels[2])
    featured = batch.replace(features=np.arange(24, dtype=np.float32).reshape(3, 4, 2))
    np.testing.assert_allclose(corruption.mean(featured).features[0], [[3, 4]] * 4)
    # In bfloat16, sums of which would keep three digits, and of pictures of their own size.
    rng = np.random.default_rng(0)
    own = rng.normal(1, 1, (3, 600, 4)).astype(ml_dtypes.bfloat16)
    sized = batch.replace(features=own, grid=np.array([[10, 60], [10, 30], [0, 0]]))
    own[1, 300:] = 99
    flat = corruption.mean(sized).features
    assert flat.dtype == own.dtype
    for tile, count in ((0, 600), (1, 300)):
        want = own[tile, :count].astype(np.float64).mean(0)
        np.testing.assert_allclose(flat[tile, 0].astype(np.float64), want, rtol=2**-7)
    change = corruption.noise(sized, scale=2.0).features.astype(np.float64) - own.astype(np.float64)
    np.testing.assert_allclose(change[0].std(), 2, rtol=0.05)
    with pytest.raises(ValueError, match="has no picture that could be corrupted"):
        corruption.noise(make(images=(0, 0), words=(5, 5)))


def test_pictures_of_other_rows(random_model):
    config = random_inputs.TINY
    model = random_model(config)
    batch = random_inputs.make_batch(images=(1, 0, 1), words=(5, 9, 8), fill=1)
    swapped = corruption.exchange(model, batch, [2, 1, 0])
    np.testing.assert_array_equal(swapped.pixels, batch.pixels[[1, 0, 2]])
    np.testing.assert_array_equal(swapped.ids, batch.ids)
    uneven = random_inputs.make_batch(images=(2, 1), words=(5, 8))
    with pytest.raises(ValueError, match="row 0 cannot get the pictures of row 1"):
        corruption.exchange(model, uneven, [1, 1])
    with pytest.raises(ValueError, match=r"pictures_of=\[3, 0, 0\] must give a row for each"):
        corruption.exchange(model, batch, [3, 0, 0])
