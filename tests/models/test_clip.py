"""The vision tower is HF's CLIP, at every site, up to the layer that is read."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from mllm_jax import sites
from mllm_jax.families.llava import model as llava
from mllm_jax.interventions import captures
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.models import clip
from mllm_jax.passes import run
from tests.helpers import hf

LAYERS = 3
STACKED = tuple(
    f"vision.{name}"
    for name in (
        "resid_pre",
        "attn.pattern",
        "attn.heads",
        "attn_out",
        "mlp.act",
        "mlp.out",
        "resid_post",
    )
)


def config_of(**vision) -> llava.LlavaConfig:
    vision = dataclasses.replace(clip.ClipConfig.tiny(), layers=LAYERS, **vision)
    return llava.LlavaConfig.of(vision, llava.DecoderConfig.tiny(), image_token=95)


def network(config: llava.LlavaConfig) -> hf.transformers.CLIPVisionModel:
    return hf.random(hf.transformers.CLIPVisionModel(hf.clip_config(config.vision)))


@pytest.mark.parametrize(
    ("act", "at", "run_layers"),
    [
        ("quick_gelu", -2, 2),
        ("quick_gelu", 0, 0),
        ("gelu", -1, 3),
        ("gelu", 1, 1),
        ("gelu_tanh", -3, 1),
    ],
)
def test_every_site(act, at, run_layers, make_batch):
    config = config_of(act=act, feature_layer=at)
    theirs = network(config)
    ours = hf.transfer(config, theirs, "vision_tower.")
    batch = make_batch(config, images=(2, 1), words=(6, 6))
    pixels = batch.pixels.transpose(0, 3, 1, 2)
    want = hf.tensors(theirs, ("vision.embed", *STACKED), "vision_tower.", pixel_values=pixels)
    assert len(want["vision.resid_post"]) == LAYERS
    run_here = {name: want[name][:run_layers] for name in STACKED} if run_layers else {}
    want = {"vision.embed": want["vision.embed"]} | run_here
    hf.assert_equal(ours, batch, want)
    # The last that is run is the one that HF reads.
    with hf.torch.no_grad():
        states = theirs(hf.torch.from_numpy(pixels), output_hidden_states=True).hidden_states
    last = want["vision.resid_post"][-1] if run_layers else want["vision.embed"]
    np.testing.assert_array_equal(last, states[at].numpy())


@pytest.mark.parametrize(("at", "run_layers"), [(-2, 2), (-1, 3), (1, 1), (0, 0)])
def test_layers_above_the_one_that_is_read_do_not_exist(at, run_layers, make_batch, random_model):
    config = config_of(feature_layer=at)
    model, batch = random_model(config), make_batch(config)
    shapes = site_shapes(model, batch)
    assert {shapes[name].layers for name in STACKED} == {run_layers}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.vision.layers)} == {run_layers}
    with pytest.raises(ValueError, match="out of range"):
        above = captures.keep(sites.vision.resid_post[run_layers])
        run.run(model, batch, None, {"above": above})
