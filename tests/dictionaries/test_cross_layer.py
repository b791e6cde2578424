"""Cross-layer transcoders: their files and their splice, against loops over layers in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import patching
from mllm_jax.analysis.contrasts import Contrast
from mllm_jax.dictionaries import cross_layer
from mllm_jax.dictionaries.dictionary import Dictionary
from tests.helpers import contrasts, generation

pytestmark = pytest.mark.usefixtures("quick_to_compile")

L, D, M = 3, 32, 10
SITE, LATENTS = S.lm.mlp.out, S.lm.mlp.out.latents


def draw(seed=0, layers=L, scale=0.3):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return [
        {
            "W_enc": normal(M, D, scale=D**-0.5), "b_enc": normal(M, scale=0.2),
            "W_dec": normal(M, layers - i, D, scale=scale), "b_dec": normal(D),
            "threshold": np.abs(normal(M, scale=0.2)),
        }
        for i in range(layers)
    ]  # fmt: skip


def save(folder, weights, thresholds=True):
    """Write the files of circuit-tracer."""
    for i, layer in enumerate(weights):
        names = ["W_enc", "b_enc", "b_dec"] + ["threshold"] * thresholds
        save_file({f"{n}_{i}": layer[n] for n in names}, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": layer["W_dec"]}, folder / f"W_dec_{i}.safetensors")


def make(weights):
    return cross_layer.CrossLayerTranscoder(
        encoder=jnp.stack([w["W_enc"].T for w in weights]),
        encoder_bias=jnp.stack([w["b_enc"] for w in weights]),
        threshold=jnp.stack([w["threshold"] for w in weights]),
        decoders=tuple(jnp.asarray(w["W_dec"]) for w in weights),
        decoder_bias=jnp.stack([w["b_dec"] for w in weights]),
    )


def latents(layer, x):
    pre = np.asarray(x, np.float64) @ layer["W_enc"].T + layer["b_enc"]
    return pre * (pre > layer["threshold"])


def written(weights, change, target):
    """What latents [L][..., M] write to one layer."""
    return sum(change[i] @ weights[i]["W_dec"][:, target - i] for i in range(target + 1))


@pytest.mark.parametrize("thresholds", [True, False])
def test_files_are_read_and_reconstruct_what_the_formula_says(thresholds, tmp_path):
    weights = draw()
    save(tmp_path, weights, thresholds)
    if not thresholds:
        for layer in weights:
            layer["threshold"] = np.zeros(M, np.float32)
    found = cross_layer.load(tmp_path)
    assert found.widths == (D, M, D) and found.layers == L
    x = np.random.default_rng(1).standard_normal((L, 5, D)).astype(np.float32)
    z = [latents(layer, x[i]) for i, layer in enumerate(weights)]
    got = found.reconstruct(jnp.asarray(x))
    for i, layer in enumerate(weights):
        np.testing.assert_allclose(found.encode(jnp.asarray(x[i]), i), z[i], atol=1e-6)
        np.testing.assert_allclose(got[i], written(weights, z, i) + layer["b_dec"], atol=2e-6)
    cross_layer.write(found, tmp_path / "again")
    again = cross_layer.load(tmp_path / "again")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, again))
    assert cross_layer.load(tmp_path, jnp.bfloat16).decoders[0].dtype == jnp.bfloat16


def test_damaged_files_are_refused(tmp_path):
    save(tmp_path, draw())
    with pytest.raises(FileNotFoundError, match="dictionaries.cross_layer.load reads"):
        mj.load_dictionary(tmp_path)
    (tmp_path / "W_enc_0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no cross-layer transcoder"):
        cross_layer.load(tmp_path)
    for change, says in {
        "a wrong decoder": "W_dec_1 is .*, expected \\[10, 2, 32\\]",
        "no bias": "layer 1 of 3: has no tensor b_enc_1",
        "not finite": "b_dec_1 has numbers that are not finite",
        "unknown": "tensors that are not known: b_skip_1",
        "a wrong width": "W_enc_1 is .*, expected \\[10, 32\\]",
    }.items():
        save(tmp_path, (weights := draw()))
        one = {f"{n}_1": weights[1][n] for n in ("W_enc", "b_enc", "b_dec", "threshold")}
        if change == "a wrong decoder":
            save_file({"W_dec_1": weights[0]["W_dec"]}, tmp_path / "W_dec_1.safetensors")
        elif change == "no bias":
            del one["b_enc_1"]
        elif change == "not finite":
            one["b_dec_1"] = np.full(D, np.nan, np.float32)
        elif change == "unknown":
            one["b_skip_1"] = weights[1]["b_dec"]
        else:
            one["W_enc_1"] = one["W_enc_1"][:, :8].copy()
        save_file(one, tmp_path / "W_enc_1.safetensors")
        with pytest.raises(ValueError, match=says) as error:
            cross_layer.load(tmp_path)
        assert len(str(error.value)) < 400


def mlp(model, layer, x):
    """What the MLP of a layer adds to a residual, by the model's own block."""
    block = jax.tree.map(lambda a: a[layer], model.lm.layers)
    return np.asarray(block.added_by_mlp(jnp.asarray(x), lambda site, x: x))


@pytest.fixture(scope="module")
def clean(model, batch):
    return mj.run(model, batch, None, {"x": mj.keep(S.lm.resid_mid), "out": mj.keep(SITE)})


def real(batch):
    return np.asarray(batch.tokens.kind != tok.CODE["pad"])[..., None]


CAPTURES = {"read": mj.keep(S.lm.resid_mid), "out": mj.keep(SITE), "z": mj.keep(LATENTS)}


def test_what_latents_write_reaches_later_layers_and_nothing_else_changes(model, batch, clean):
    weights = draw()
    splice = mj.splice(SITE, make(weights), reads=S.lm.resid_mid)
    plain = mj.run(model, batch, splice, CAPTURES)
    np.testing.assert_array_equal(plain.logits, clean.logits)
    for i in range(L):
        want = np.where(real(batch), latents(weights[i], clean["x"][i]), 0)
        np.testing.assert_allclose(plain["z"][i], want, atol=1e-5)
    assert 0.2 < (np.asarray(plain["z"]) > 0).mean() < 0.6
    edits = splice >> mj.ablate(LATENTS[0, :4], where=tok.image) >> mj.add(LATENTS[1, 7], 0.5)
    out = mj.run(model, batch, edits, CAPTURES)
    image = np.asarray(tok.image.mask(batch.tokens))[..., None]
    change = [np.zeros((*image.shape[:2], M)) for _ in range(L)]
    before = [latents(layer, out["read"][i]) for i, layer in enumerate(weights)]
    change[0][..., :4] = np.where(image, -before[0][..., :4], 0)
    change[1][..., 7] = 0.5
    for i in range(L):
        # What the MLP itself adds to what it reads in this pass, and what latents change of it.
        want = mlp(model, i, out["read"][i]) + written(weights, change, i)
        np.testing.assert_allclose(out["out"][i], np.where(real(batch), want, 0), atol=2e-5)
        want = np.where(real(batch), before[i] + change[i], 0)
        np.testing.assert_allclose(out["z"][i], want, atol=1e-5)
    assert np.abs(np.asarray(out["out"])[2] - np.asarray(clean["out"])[2]).max() > 0.05
    changed = np.asarray(out.receipts[0].elements).tolist()
    assert min(changed) > 0


@pytest.mark.slow
def test_without_the_error_all_layers_are_the_reconstruction(model, batch):
    weights = draw()
    edits = mj.splice(SITE, make(weights), reads=S.lm.resid_mid, error=False, where=tok.image)
    edits >>= mj.scale(LATENTS[0], 2.0, where=tok.image)
    out = mj.run(model, batch, edits, CAPTURES, logits="none")
    z = [latents(layer, out["read"][i]) * (2 if i == 0 else 1) for i, layer in enumerate(weights)]
    image = np.asarray(tok.image.mask(batch.tokens))[..., None]
    for i, layer in enumerate(weights):
        want = np.where(image, written(weights, z, i) + layer["b_dec"], out["out"][i])
        np.testing.assert_allclose(out["out"][i], want, atol=3e-5)


@pytest.mark.slow
def test_bfloat16_without_a_change_is_bitwise_clean(model, batch):
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    small = batch.replace(features=None)
    splice = mj.splice(SITE, make(draw()), reads=S.lm.mlp.input)
    same = mj.run(narrow, small, splice >> mj.scale(LATENTS[0, :5], 1.0))
    np.testing.assert_array_equal(same.logits, mj.run(narrow, small).logits)


@pytest.mark.slow
def test_sweeps_and_generation_equal_single_passes(model, batch):
    splice = mj.splice(SITE, make(draw(scale=1.0)), reads=S.lm.resid_mid)
    lanes = [splice >> mj.scale(LATENTS[i % L, i], 4.0, where=tok.text) for i in range(6)]
    rows = mj.sweep(_logits, model, batch, lanes, chunk=3)
    loop = np.stack([mj.run(model, batch, edits).logits for edits in lanes])
    np.testing.assert_allclose(rows, loop, atol=1e-5)
    assert (np.abs(rows - np.asarray(mj.run(model, batch).logits)).max((1, 2)) > 1e-3).all()
    edits = splice >> mj.add(LATENTS[0, 3], 4.0)
    generation.assert_equals_one_pass(model, batch, edits)


def _logits(out):
    return out.logits


@pytest.mark.slow
def test_of_a_linear_model_attributions_are_slopes_times_all_that_latents_write():
    linear = contrasts.contrast(contrasts.linear_model())
    weights = draw()
    splice = mj.splice(SITE, make(weights), reads=S.lm.resid_mid)
    kept = {"x": mj.keep(S.lm.resid_mid)}
    x, other = (mj.run(linear.model, b, None, kept)["x"] for b in (linear.clean, linear.corrupt))
    contrast = Contrast.of(contrasts.METRIC, linear.model, linear.clean, linear.corrupt, splice)
    found = patching.attribute(contrast, [LATENTS]).values[LATENTS.name]

    def metric(add):
        return linear.metric(mj.run(linear.model, linear.clean, mj.add(SITE, add))).sum()

    slope = np.asarray(jax.grad(metric)(jnp.zeros(x.shape)))
    for i, layer in enumerate(weights):
        change = latents(layer, x[i]) - latents(layer, other[i])
        along = sum(slope[j] @ layer["W_dec"][:, j - i].T for j in range(i, L))
        assert np.abs(change * along).max() > 1e-3
        np.testing.assert_allclose(found[i], change * along, rtol=1e-3, atol=5e-5)


def test_what_does_not_fit_is_refused(model, batch):
    transcoder = make(draw())
    with pytest.raises(ValueError, match="all layers of a site, such as lm.mlp.out"):
        mj.splice(SITE[1], transcoder, reads=S.lm.resid_mid)
    with pytest.raises(ValueError, match="needs the site that its latents read"):
        mj.splice(SITE, transcoder)
    splice = mj.splice(SITE, transcoder, reads=S.lm.resid_mid)
    own = Dictionary(
        encoder=jnp.ones((D, M)), encoder_bias=jnp.ones(M), decoder=jnp.ones((M, D)),
        decoder_bias=jnp.ones(D),
    )  # fmt: skip
    with pytest.raises(ValueError, match="spliced at lm.mlp.out: it must be the only splice there"):
        mj.run(model, batch, splice >> mj.splice(SITE[1], own))
    few = mj.splice(SITE, make(draw(layers=2)), reads=S.lm.resid_mid)
    with pytest.raises(ValueError, match="has 2 layers, and the model has 3"):
        mj.run(model, batch, few)
    with pytest.raises(ValueError, match="no earlier site of the same layer"):
        mj.run(model, batch, mj.splice(S.lm.resid_mid, transcoder, reads=SITE))
