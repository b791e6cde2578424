"""A splice changes its site by what its edited latents change, which NumPy computes as well."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.dictionaries.dictionary import Dictionary
from mllm_jax.families.llava import model as llava
from mllm_jax.interventions import spec
from tests.helpers import generation

D, M = 32, 24
HERE, LATENTS = S.lm.resid_post[1], S.lm.resid_post.latents


def make(seed=0, width=D, out=None, latents=M, **more) -> Dictionary:
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    return Dictionary(
        encoder=normal(width, latents, scale=width**-0.5), encoder_bias=normal(latents, scale=0.2),
        decoder=normal(latents, out or width, scale=0.3), decoder_bias=normal(out or width),
        **{"threshold": jnp.abs(normal(latents, scale=0.2)), **more},
    )  # fmt: skip


@pytest.fixture(scope="module")
def clean(model, batch):
    captures = {
        "x": mj.keep(HERE), "in": mj.keep(S.lm.mlp.input[1]), "out": mj.keep(S.lm.mlp.out[1]),
    }  # fmt: skip
    return mj.run(model, batch, None, captures)


def latents_of(dictionary, x):
    """NumPy, for dictionaries without norm and k."""
    d = jax.tree.map(lambda a: np.asarray(a, np.float64), dictionary)
    pre = np.asarray(x, np.float64) @ d.encoder + d.encoder_bias
    return np.where(pre > d.threshold, np.maximum(pre, 0), 0), d


def real(batch):
    return np.asarray(batch.tokens.kind != tok.CODE["pad"])


def test_without_edits_the_pass_is_the_clean_one_and_latents_are_read(model, batch, clean):
    captures = {
        "z": mj.keep(LATENTS[1]), "all": mj.keep(LATENTS), "few": mj.keep(LATENTS[1], k=5),
        "some": mj.keep(LATENTS[1, [7, 3]], where=tok.image), "stats": mj.stats(LATENTS, by=tok.kind),
        "top": mj.top(LATENTS[1], k=2),
    }  # fmt: skip
    out = mj.run(model, batch, mj.splice(HERE, make()), captures)
    np.testing.assert_array_equal(out.logits, clean.logits)
    assert int(np.sum(out.receipts[0].elements)) == 0
    assert int(np.max(out.receipts[0].tokens)) == real(batch).sum()
    z, _ = latents_of(make(), clean["x"])
    z = np.where(real(batch)[..., None], z, 0)
    assert 0.2 < (z > 0).mean() < 0.6
    np.testing.assert_allclose(out["z"], z, atol=1e-5)
    np.testing.assert_array_equal(out["all"], np.asarray(out["z"])[None])
    image = np.asarray(batch.tokens.kind == tok.CODE["image"])[..., None]
    np.testing.assert_allclose(out["some"], np.where(image, z[..., [7, 3]], 0), atol=1e-5)
    few, order = out["few"], np.argsort(-z, -1, kind="stable")[..., :5]
    np.testing.assert_allclose(few.values, np.take_along_axis(z, order, -1), atol=1e-5)
    np.testing.assert_array_equal(
        few.indices >= 0, np.broadcast_to(real(batch)[..., None], order.shape)
    )
    positive = few.values > 0
    np.testing.assert_array_equal(np.asarray(few.indices)[positive], order[positive])
    np.testing.assert_array_equal(few.active, (z > 0).sum(-1))
    np.testing.assert_allclose(np.sum(out["stats"].sum, -1)[0], z.sum((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(out["top"].value[:, 0], z.max((0, 1)), atol=1e-5)


def test_latents_are_edited_as_neurons_are(model, batch, clean):
    dictionary = make()
    edits = (
        mj.splice(HERE, dictionary)
        >> mj.ablate(LATENTS[1, [0, 1]], where=tok.image)
        >> mj.scale(LATENTS[1, 2:4], 3.0, where=tok.text)
        >> mj.add(LATENTS[1, [4]], 0.5)
        >> mj.replace(LATENTS[1, [5, 6]], np.array([2.0, -1.0]), where=tok.last)
        >> mj.scale(LATENTS[1], np.linspace(1, 2, M), where=tok.row(1))
    )
    out = mj.run(model, batch, edits, {"x": mj.keep(HERE), "z": mj.keep(LATENTS[1])}, logits="none")
    z, d = latents_of(dictionary, clean["x"])
    new = z.copy()
    map_ = model.token_maps(batch)["lm"]

    def at(where):
        return np.asarray(where.mask(map_))[..., None]

    new[..., :2] = np.where(at(tok.image), 0, new[..., :2])
    new[..., 2:4] *= np.where(at(tok.text), 3, 1)
    new[..., 4] += 0.5 * real(batch)
    new[..., 5:7] = np.where(at(tok.last), [2.0, -1.0], new[..., 5:7])
    new *= np.where(at(tok.row(1)), np.linspace(1, 2, M), 1)
    want = np.asarray(clean["x"]) + (new - z) @ d.decoder
    np.testing.assert_allclose(out["x"], np.where(real(batch)[..., None], want, 0), atol=2e-5)
    np.testing.assert_allclose(out["z"], np.where(real(batch)[..., None], new, 0), atol=1e-5)
    changed = [int(np.sum(receipt.elements)) for receipt in out.receipts[1:]]
    images = int(np.asarray(at(tok.image)).sum())
    assert int(out.receipts[1].tokens[1]) == images and int(out.receipts[1].tokens[0]) == 0
    assert changed[2] == real(batch).sum() and changed[0] == int(
        (at(tok.image) * z[..., :2] > 0).sum()
    )


@pytest.mark.slow
def test_without_the_error_the_reconstruction_is_in_place(model, batch, clean):
    for more in ({}, {"norm": "layer"}, {"k": 3, "threshold": np.float32(0)}):
        dictionary = make(**more)
        edits = mj.splice(HERE, dictionary, error=False, where=tok.image)
        out = mj.run(model, batch, edits, {"x": mj.keep(HERE)}, logits="none")
        image = np.asarray(batch.tokens.kind == tok.CODE["image"])[..., None]
        x = np.asarray(clean["x"])
        want = np.where(image, np.asarray(dictionary.reconstruct(x)), x)
        np.testing.assert_allclose(out["x"], want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("error", [True, False])
def test_a_skip_transcoder_reads_what_enters_the_mlp(error, model, batch, clean):
    rng = np.random.default_rng(4)
    transcoder = make(skip=jnp.asarray(0.2 * rng.standard_normal((D, D)), jnp.float32))
    edits = mj.splice(S.lm.mlp.out[1], transcoder, error=error, reads=S.lm.mlp.input)
    edits >>= mj.ablate(S.lm.mlp.out.latents[1, :9])
    out = mj.run(model, batch, edits, {"out": mj.keep(S.lm.mlp.out[1])}, logits="none")
    z, d = latents_of(transcoder, clean["in"])
    new = np.where(np.arange(M) < 9, 0, z)
    want = np.asarray(clean["out"]) + (new - z) @ d.decoder
    if not error:
        want = new @ d.decoder + d.decoder_bias + np.asarray(clean["in"], np.float64) @ d.skip
    np.testing.assert_allclose(out["out"], np.where(real(batch)[..., None], want, 0), atol=2e-5)


@pytest.mark.slow
def test_two_layers_and_heads_have_dictionaries_of_their_own(model, batch):
    one, two = make(1), make(2)
    edits = mj.splice(S.lm.attn.heads[0], make(3)) >> mj.splice(S.lm.resid_post[2], two)
    edits >>= mj.splice(S.lm.resid_post[0], one) >> mj.ablate(LATENTS[0, 1])
    captures = {"z": mj.keep(LATENTS), "second": mj.keep(LATENTS[[0, 2]])}
    captures |= {"x": mj.keep(S.lm.resid_post), "n": mj.keep(S.lm.attn.heads[0])}
    captures |= {"heads": mj.keep(S.lm.attn.heads.latents[0])}
    out = mj.run(model, batch, edits, captures, logits="none")
    heads = np.asarray(out["n"]).reshape(*out["n"].shape[:2], -1)
    keep = real(batch)[..., None]
    np.testing.assert_allclose(
        out["heads"], np.where(keep, latents_of(make(3), heads)[0], 0), atol=1e-5
    )
    z, _ = latents_of(two, out["x"][2])
    np.testing.assert_allclose(out["z"][0], np.where(keep, z, 0), atol=1e-5)  # in their order
    np.testing.assert_array_equal(out["second"], np.asarray(out["z"])[::-1])
    assert not np.asarray(out["z"])[1, ..., 1].any() and np.asarray(out["z"])[0, ..., 1].any()


@pytest.mark.slow
def test_the_gradient_of_all_gates_is_the_product_with_the_decoder(model, batch, clean):
    dictionary = make()

    def logit(gates, add):
        edits = mj.splice(HERE, dictionary) >> mj.scale(LATENTS[1], gates) >> mj.add(HERE, add)
        return mj.run(model, batch, edits).logits[:, 5].sum()

    x = np.asarray(clean["x"])
    by_gate, by_x = jax.grad(logit, argnums=(0, 1))(jnp.ones(M), jnp.zeros((1, *x.shape)))
    z, d = latents_of(dictionary, x)
    want = np.einsum("BTM,MD,BTD->M", np.where(real(batch)[..., None], z, 0), d.decoder, by_x[0])
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(by_gate, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
def test_a_backward_pass_keeps_no_latents_for_layers_without_a_splice(
    random_model, tiny_config, make_batch
):
    wide = make(latents=4096)
    small = make_batch()

    def logit(gates, model):
        edits = mj.splice(HERE, wide) >> mj.scale(LATENTS[1], gates)
        return mj.run(model, small, edits).logits[:, 5].sum()

    taken = {}
    for layers in (2, 10):
        lm = dataclasses.replace(tiny_config.lm, layers=layers)
        model = random_model(llava.LlavaConfig.of(tiny_config.vision, lm, fold=2, image_token=95))
        program = jax.jit(jax.grad(logit)).lower(jnp.ones(4096), model).compile()
        taken[layers] = program.memory_analysis().temp_size_in_bytes
    of_one_layer = small.ids.size * 4096 * 4
    assert taken[2] > of_one_layer and taken[10] - taken[2] < 2 * of_one_layer


@pytest.mark.slow
def test_a_sweep_over_latents_compiles_nothing_again_and_equals_a_loop(model, batch):
    dictionary, second = make(), make(8)
    captures = {"active": mj.keep(LATENTS[1], k=4)}

    def edits(of, latents):
        one = mj.splice(HERE, of)
        return [one >> mj.ablate(LATENTS[1, i], where=tok.text) for i in latents]

    rows = mj.sweep(_metric, model, batch, edits(dictionary, range(M)), captures, chunk=8)
    before = mj.compiles()
    other = mj.sweep(_metric, model, batch, edits(second, [3, 5] * 4), captures, chunk=8)
    assert mj.compiles() == before
    np.testing.assert_array_equal(other[0][0], other[0][2])
    loop = [_metric(mj.run(model, batch, e, captures)) for e in edits(dictionary, range(M))]
    for i, name in enumerate(("logits", "indices")):
        np.testing.assert_allclose(rows[i], np.stack([r[i] for r in loop]), atol=1e-5, err_msg=name)
    assert np.abs(rows[0] - rows[0][:1]).max() > 1e-2


def _metric(out):
    return out.logits, out["active"].indices


@pytest.mark.slow
def test_a_thousand_latents_are_one_sweep(model, batch):
    dictionary = make(latents=1000)
    edits = [mj.splice(HERE, dictionary) >> mj.ablate(LATENTS[1, i]) for i in range(1000)]
    few = mj.sweep(_logits, model, batch, edits[:64], chunk=64)
    before = mj.compiles()
    rows = mj.sweep(_logits, model, batch, edits, chunk=64)
    assert rows.shape[0] == 1000 and mj.compiles() == before
    np.testing.assert_allclose(few, rows[:64], atol=1e-6)
    loop = np.stack([mj.run(model, batch, edit).logits for edit in edits[::4]])
    np.testing.assert_allclose(rows[::4], loop, atol=1e-5)
    assert (np.abs(rows - rows[:1]).max((1, 2)) > 1e-3).mean() > 0.5


def _logits(out):
    return out.logits


@pytest.mark.slow
def test_bfloat16_is_bitwise_clean_and_generation_equals_one_pass(model, batch):
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    edits = mj.splice(HERE, make()) >> mj.scale(LATENTS[1, :5], 1.0)
    small = batch.replace(features=None)
    np.testing.assert_array_equal(mj.run(narrow, small, edits).logits, mj.run(narrow, small).logits)
    edits = mj.splice(HERE, make()) >> mj.add(LATENTS[1, 3], 4.0)
    generation.assert_equals_one_pass(model, batch, edits)


WRONG = {
    "width": (lambda: mj.splice(HERE, make(width=8)), "reads vectors of 8 and returns 8"),
    "a later site": (
        lambda: mj.splice(S.lm.resid_mid[1], make(), reads=S.lm.mlp.out), "no earlier site of the same layer",
    ),
    "one layer twice": (lambda: mj.splice(HERE, make()) >> mj.splice(HERE, make()), "at one layer"),
    "unequal widths": (
        lambda: mj.splice(HERE, make()) >> mj.splice(S.lm.resid_post[0], make(latents=9)),
        "9 and 24 latents",
    ),
    "no splice": (lambda: mj.ablate(LATENTS[1, 2]), "no dictionary is spliced at lm.resid_post"),
    "another layer": (
        lambda: mj.splice(HERE, make()) >> mj.ablate(LATENTS[2, 2]), "layers with one: 1",
    ),
    "a layer too many": (
        lambda: mj.splice(HERE, make()) >> mj.ablate(LATENTS[[1, 2], 2]),
        "latents: layer 2 has no dictionary",
    ),
    "other tokens": (
        lambda: mj.splice(HERE, make(), where=tok.image) >> mj.ablate(LATENTS[1], where=tok.text),
        "the ablate lm.resid_post.latents selects no token at which a dictionary is spliced",
    ),
    "a latent too many": (lambda: mj.splice(HERE, make()) >> mj.ablate(LATENTS[1, M]), "24"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(name, model, batch):
    make_edits, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        mj.run(model, batch, make_edits())
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_what_can_be_seen_at_once_is_refused_at_once(model, batch):
    with pytest.raises(ValueError, match="one layer of lm.resid_post"):
        mj.splice(S.lm.resid_post[:2], make())
    with pytest.raises(ValueError, match="splice does not apply to lm.attn.pattern"):
        mj.splice(S.lm.attn.pattern[1], make())
    with pytest.raises(AttributeError, match="no dictionary reads logits"):
        S.logits.latents  # noqa: B018
    with pytest.raises(ValueError, match="has no strength for per_step"):
        mj.per_step(mj.splice(HERE, make()), [1.0])
    with pytest.raises(ValueError, match="same dictionary in each splice"):
        mj.stack([mj.splice(HERE, make(i)) >> mj.ablate(LATENTS[1, 0]) for i in (0, 1)])
    with pytest.raises(ValueError, match="layer 0 has no dictionary"):
        mj.run(model, batch, mj.splice(HERE, make()), {"z": mj.keep(LATENTS[0])})
    with pytest.raises(ValueError, match="k=99 of lm.resid_post.latents: it has 24 units"):
        mj.run(model, batch, mj.splice(HERE, make()), {"z": mj.keep(LATENTS, k=99)})


def test_edits_of_latents_are_text_and_json_and_splices_are_not():
    edits = spec.parse("ablate lm.resid_post.latents[1,3+5] where=text")
    assert next(iter(edits)).address.site == LATENTS == S.get("lm.resid_post.latents")
    again = spec.from_json(spec.to_json(edits))
    assert spec.digest(again) == spec.digest(edits)
    captures = spec.parse_captures("few=keep lm.resid_post.latents[1] k=4")
    assert captures["few"].form == "sparse" and captures["few"].k == 4
    with pytest.raises(ValueError, match="the splice at lm.resid_post holds a dictionary"):
        spec.to_json(mj.splice(HERE, make()))
