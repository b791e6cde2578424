"""Attention in the vision tower: patterns, masses and knockouts, against hooks and NumPy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.llava import model as llava
from mllm_jax.interventions import layer_tap, tap
from mllm_jax.models import clip
from tests.helpers import hf

CONFIG = llava.LlavaConfig.of(
    dataclasses.replace(clip.ClipConfig.tiny(), layers=3, feature_layer=-1, select="full"),
    llava.DecoderConfig.tiny(),
    image_token=95,
)
GRID, HEADS = CONFIG.vision.grid, CONFIG.vision.heads
PLACES = GRID**2 + 1  # with CLS
ROW = 1 + np.arange(GRID)  # the patches of row 0


@pytest.fixture(scope="module")
def network():
    return hf.random(hf.transformers.CLIPVisionModel(hf.clip_config(CONFIG.vision)))


@pytest.fixture(scope="module")
def model(network):
    return hf.transfer(CONFIG, network, "vision_tower.")


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(CONFIG, images=(2, 1), words=(6, 6))


def hooked(network, batch, layers, heads, to, on) -> np.ndarray:
    """Their last hidden state, where some queries do not see some keys."""
    hidden = np.zeros((1, HEADS, PLACES, PLACES), np.float32)
    hidden[np.ix_([0], heads, to, on)] = np.finfo(np.float32).min
    mask = hf.torch.from_numpy(hidden)

    def hide(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask}

    blocks = [m for n, m in network.named_modules() if n.endswith("self_attn")]
    hooks = [blocks[i].register_forward_pre_hook(hide, with_kwargs=True) for i in layers]
    pixels = hf.torch.from_numpy(batch.pixels.transpose(0, 3, 1, 2))
    with hf.torch.no_grad():
        out = network(pixels, output_hidden_states=True).hidden_states[-1].numpy()
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize(
    ("address", "layers", "heads", "to", "on"),
    [
        (S.vision.attn[1:], [1, 2], range(HEADS), "cls", "row"),
        (S.vision.attn[0, [0, 3]], [0], [0, 3], "image", "cls"),
        (S.vision.attn.mask[[0, 2], 1], [0, 2], [1], "row", "image"),
    ],
    ids=str,
)
def test_a_knockout_is_a_mask_in_hf(address, layers, heads, to, on, network, model, batch):
    where = {"cls": tok.cls, "row": tok.row(0), "image": tok.image}
    places = {"cls": [0], "row": ROW, "image": np.arange(1, PLACES)}
    want = hooked(network, batch, layers, list(heads), places[to], places[on])
    captures = {"state": mj.keep(S.vision.resid_post[-1])}
    out = mj.run(model, batch, mj.knockout(address, to=where[to], on=where[on]), captures)
    np.testing.assert_allclose(out["state"], want, rtol=0, atol=1e-5)
    clean = hooked(network, batch, [], [0], [0], [0])
    assert np.abs(want - clean).max() > 1e-2
    (receipt,) = out.receipts
    cut = len(batch.pixels) * len(list(heads)) * len(places[to]) * len(places[on])
    np.testing.assert_array_equal(receipt.elements, [cut * (i in layers) for i in range(3)])


def test_a_mass_is_the_sum_of_the_pattern(model, batch):
    captures = {
        "pattern": mj.keep(S.vision.attn.pattern),
        "mass": mj.mass(S.vision.attn.pattern, on=tok.row(0), where=tok.cls),
    }
    out = mj.run(model, batch, None, captures)
    pattern = np.asarray(out["pattern"])  # [L, I, N, P, S]
    np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-5)
    tiles = pattern[:, :, :, 0, ROW].sum(-1)
    # The first row reads tiles 0 and 1; the second the third, and none in its second place.
    want = np.stack([tiles[:, :2].mean(1), tiles[:, 2]], 1)
    np.testing.assert_allclose(out["mass"], want, rtol=0, atol=1e-6)


def test_a_knockout_of_all_keys_leaves_the_heads_zero(model, batch):
    edit = mj.knockout(S.vision.attn[1], to=tok.row(0), on=tok.every)
    out = mj.run(model, batch, edit, {"heads": mj.keep(S.vision.attn.heads[1])})
    heads = np.asarray(out["heads"])
    assert not heads[:, ROW].any() and np.abs(heads[:, 0]).max() > 0.1


def test_a_sweep_of_knockouts_is_a_loop(random_model, batch):
    model = random_model(CONFIG)
    edits = [mj.knockout(S.vision.attn[i], to=tok.every, on=tok.row(0)) for i in (0, 1, 2)]
    got = mj.sweep(lambda out: out.logits, model, batch, mj.stack(edits))
    for edit, logits in zip(edits, got, strict=True):
        np.testing.assert_allclose(logits, mj.run(model, batch, edit).logits, rtol=0, atol=1e-5)
    assert np.abs(got[0] - got[2]).max() > 1e-4


def test_nothing_is_materialised_where_nobody_reads(model, batch, monkeypatch):
    called = []
    offer = layer_tap.LayerTap.__call__
    monkeypatch.setattr(
        layer_tap.LayerTap, "__call__", lambda *a: called.append(a[1].name) or offer(*a)
    )
    jax.eval_shape(lambda pixels: model.vision(pixels, tap.Taps().module("vision")), batch.pixels)
    assert "vision.attn.heads" in called
    assert not {"vision.attn.mask", "vision.attn.pattern"} & set(called)
