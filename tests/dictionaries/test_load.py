"""Published files load as dictionaries that compute what the code of their publishers does."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mllm_jax as mj
from mllm_jax.dictionaries.dictionary import Dictionary
from tests.helpers import published_dictionaries as published
from tests.helpers.published_dictionaries import D, M

SAELENS = functools.partial(functools.partial, published.saelens)
FILES = {
    "relu": SAELENS(kind="standard"),
    "relu, input as it is": SAELENS(kind="standard", subtract=False),
    "relu, constant length": SAELENS(kind="standard", norm="constant_norm_rescale"),
    "jumprelu": SAELENS(kind="jumprelu", subtract=False),
    "jumprelu, layer norm": SAELENS(kind="jumprelu", norm="layer_norm"),
    "topk": SAELENS(kind="topk", k=4),
    "topk of decoder's length": SAELENS(kind="topk", k=4, rescale_acts_by_decoder_norm=True),
    "gated": SAELENS(kind="gated"),
    "transcoder": SAELENS(kind="transcoder"),
    "skip transcoder": SAELENS(kind="skip_transcoder"),
    "jumprelu transcoder": SAELENS(kind="jumprelu_transcoder"),
    "jumprelu skip transcoder": SAELENS(kind="jumprelu_skip_transcoder"),
    "Gemma Scope": published.gemma_scope,
    "Gemma Scope 2": functools.partial(published.gemma_scope, name="params.safetensors"),
    "Gemma Scope 2, skip": functools.partial(
        published.gemma_scope, name="params.safetensors", skip=True
    ),
    "multimodal-sae": functools.partial(published.sparsify, signed=False),
    "sparsify transcoder": functools.partial(published.sparsify, transcode=True),
    "sparsify skip": functools.partial(published.sparsify, transcode=True, skip=True),
    "Llama Scope": published.llama_scope,
    "Llama Scope, plain": functools.partial(published.llama_scope, include=False),
    "Llama Scope topk": functools.partial(published.llama_scope, include=False, act="topk"),
    "Llama Scope R1": functools.partial(published.llama_scope, learned=True),
}
FEW = ("jumprelu, layer norm", "gated", "skip transcoder", "sparsify skip", "Llama Scope")
SLOW = ((), pytest.mark.slow)
X = np.random.default_rng(9).standard_normal((2, 7, D)).astype(np.float32)


def loop(fn, *arrays):
    """Apply a function of single vectors in float64."""
    flat = [np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in arrays]
    return np.stack([fn(*vectors) for vectors in zip(*flat, strict=True)]).reshape(2, 7, -1)


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_computes_what_its_own_code_does(name, tmp_path):
    encode, decode = FILES[name](tmp_path)
    dictionary = mj.load_dictionary(tmp_path)
    z, latents = loop(encode, X), np.asarray(dictionary.encode(X))
    assert 0.05 < (z > 0).mean() < 0.9
    np.testing.assert_allclose(latents, z, rtol=0, atol=1e-6)
    y = loop(decode, z, X)
    np.testing.assert_allclose(dictionary.decode(latents, X), y, rtol=0, atol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(dictionary)} == {np.dtype(np.float32)}
    # A change of latents changes the reconstruction by as much.
    change = np.random.default_rng(3).standard_normal(z.shape).astype(np.float32)
    want = loop(decode, z + change, X) - y
    np.testing.assert_allclose(dictionary.decode_change(change, X), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW[n not in FEW]) for n in FILES])
def test_what_is_written_is_read_again(name, tmp_path):
    FILES[name](tmp_path / "from")
    first = mj.load_dictionary(tmp_path / "from")
    mj.write_dictionary(first, tmp_path / "to")
    again = mj.load_dictionary(tmp_path / "to")
    np.testing.assert_allclose(again.encode(X), first.encode(X), rtol=0, atol=1e-6)
    np.testing.assert_allclose(again.reconstruct(X), first.reconstruct(X), rtol=0, atol=1e-6)
    before = [path.read_bytes() for path in sorted((tmp_path / "to").iterdir())]
    mj.write_dictionary(again, tmp_path / "to")
    assert before == [path.read_bytes() for path in sorted((tmp_path / "to").iterdir())]


def test_a_factor_that_is_not_in_the_weights(tmp_path):
    """SAELens multiplies what it encodes by the factor, and divides what it returns."""
    encode, decode = published.saelens(tmp_path, "standard", norm="expected_average_only_in")
    with pytest.warns(UserWarning, match="norm_scaling_factor.*pretrained_saes.yaml"):
        unscaled = mj.load_dictionary(tmp_path)
    np.testing.assert_allclose(unscaled.encode(X), loop(encode, X), rtol=0, atol=1e-6)
    spoil_config(tmp_path, norm_scaling_factor=1.75)
    dictionary = mj.load_dictionary(tmp_path)
    z = loop(encode, 1.75 * X)
    np.testing.assert_allclose(dictionary.encode(X), z, rtol=0, atol=2e-6)
    y = loop(decode, z, 1.75 * X) / 1.75
    np.testing.assert_allclose(dictionary.reconstruct(X), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["constant_norm_rescale", "layer_norm"])
def test_a_vector_of_zeros_has_latents_and_a_slope(norm, tmp_path):
    published.saelens(tmp_path, "standard", norm=norm)
    dictionary = mj.load_dictionary(tmp_path)
    zeros = np.zeros((1, D), np.float32)
    assert np.isfinite(dictionary.reconstruct(zeros)).all()
    slope = jax.grad(lambda x: dictionary.reconstruct(x).sum())(zeros)
    assert np.isfinite(slope).all()


def test_settings_before_saelens_6(tmp_path):
    """TopK was an activation function, a bool meant the norm, and a factor was fine-tuned."""
    encode, _ = published.saelens(tmp_path, "topk", k=4)
    fields = json.loads((tmp_path / "cfg.json").read_text())
    del fields["architecture"], fields["k"], fields["metadata"]
    fields |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4},
               "normalize_activations": False, "hook_point": "blocks.3.hook_resid_pre"}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(fields))
    dictionary = mj.load_dictionary(tmp_path)
    np.testing.assert_allclose(dictionary.encode(X), loop(encode, X), rtol=0, atol=1e-6)
    arrays = load_file(tmp_path / "sae_weights.safetensors")
    arrays["scaling_factor"] = np.linspace(0.5, 2, M, dtype=np.float32)
    save_file(arrays, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="finetuning_scaling_factor is not true"):
        mj.load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(fields | {"finetuning_scaling_factor": True}))
    tuned = mj.load_dictionary(tmp_path)
    np.testing.assert_allclose(tuned.encode(X), dictionary.encode(X), rtol=0, atol=0)
    want = np.asarray(dictionary.decoder) * arrays["scaling_factor"][:, None]
    np.testing.assert_allclose(tuned.decoder, want, rtol=1e-6)


def test_bfloat16_and_the_path_of_a_file(tmp_path):
    published.gemma_scope(tmp_path, "params.safetensors")
    arrays = load_file(tmp_path / "params.safetensors")
    save_file({n: a.astype("bfloat16") for n, a in arrays.items()}, tmp_path / "params.safetensors")
    dictionary = mj.load_dictionary(tmp_path / "params.safetensors")
    assert dictionary.encoder.dtype == np.float32
    np.testing.assert_allclose(dictionary.encoder, arrays["w_enc"], rtol=2**-8)


def spoil_config(folder, **fields):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spoil_weights(folder, name="sae_weights.safetensors", **changes):
    arrays = load_file(folder / name) | changes
    save_file({n: a for n, a in arrays.items() if a is not None}, folder / name)


NAN = np.full((M, D), np.nan, np.float32)
WRONG = {
    "another architecture": (lambda f: spoil_config(f, architecture="temporal"), "architecture='te"),
    "another width": (lambda f: spoil_config(f, d_in=D + 1), "W_enc is .12, 20., expected .13, 20"),
    "a list": (lambda f: spoil_config(f, d_sae=[M]), "d_sae="),
    "a huge k": (lambda f: spoil_config(f, architecture="topk", k=M + 1), "k is 21, but there are 20"),
    "no k": (lambda f: spoil_config(f, architecture="topk"), "k, the number of latents of a token, is missing"),
    "no tensor": (lambda f: spoil_weights(f, W_dec=None), "no tensor W_dec"),
    "a further tensor": (lambda f: spoil_weights(f, W_extra=NAN), "not known: W_extra"),
    "NaN": (lambda f: spoil_weights(f, W_dec=NAN), "decoder has numbers that are not finite"),
    "booleans": (lambda f: spoil_weights(f, W_dec=NAN > 0), "W_dec holds bool"),
    "no JSON": (lambda f: (f / "cfg.json").write_text("{"), "not readable as JSON"),
    "no config": (lambda f: (f / "cfg.json").unlink(), "no dictionary"),
    "half a file": (lambda f: (f / "sae_weights.safetensors").write_bytes(b"\x10" * 99), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_one_line(name, tmp_path):
    spoil, message = WRONG[name]
    published.saelens(tmp_path, "standard")
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        mj.load_dictionary(tmp_path)
    text = str(error.value)
    assert len(text) < 400 and "\n" not in text and str(tmp_path) in text


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p, a: np.savez_compressed(p, **a), "compressed"),
        (lambda p, a: p.write_bytes(p.read_bytes()[:-200]), "truncated or altered"),
        (lambda p, a: np.savez(p, **(a | {"W_enc": np.array([{}], object)})), "not a readable"),
        (lambda p, a: np.savez(p, **(a | {"threshold": a["threshold"][:3]})), "threshold is"),
    ],
)
def test_a_wrong_npz_is_refused_in_one_line(spoil, message, tmp_path):
    published.gemma_scope(tmp_path)
    path = tmp_path / "params.npz"
    with np.load(path) as opened:
        arrays = dict(opened)
    spoil(path, arrays)
    with pytest.raises(ValueError, match=message) as error:
        mj.load_dictionary(tmp_path)
    assert len(str(error.value)) < 400 and str(tmp_path) in str(error.value)


def test_what_no_layout_can_say_is_not_written(tmp_path):
    weights = published.draw(0)
    names = {
        "W_enc": "encoder",
        "b_enc": "encoder_bias",
        "W_dec": "decoder",
        "b_dec": "decoder_bias",
    }
    common = {ours: weights[theirs] for theirs, ours in names.items()}
    skip = np.ones((D, D), np.float32)
    wider = {"decoder": np.ones((M, D + 3)), "decoder_bias": np.ones(D + 3)}
    for more in (
        {"k": 3, "threshold": weights["threshold"]}, {"norm": "layer", "skip": skip},
        {"k": 3} | wider, {"k": 3, "skip": np.ones((D, D + 3))} | wider,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no layout"):
            mj.write_dictionary(Dictionary(**(common | more)), tmp_path)
    assert not list(tmp_path.iterdir())
