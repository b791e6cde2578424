"""InternViT is that of transformers: layer scale, both norms, norms of queries and keys."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from mllm_jax.checkpoints.networks import internvit as network_
from mllm_jax.models import internvit
from tests.helpers import hf, towers

TINY = internvit.InternVitConfig.tiny()
PIXELS = np.random.default_rng(0).normal(size=(3, 24, 24, 3)).astype(np.float32)
CONFIGS = {
    "InternVL 3": TINY,
    "qk-norm, RMS, final norm, no bias": dataclasses.replace(
        TINY, qk_norm=True, norm="rms", final_norm=True, qkv_bias=False, eps=1e-3
    ),
    "qk-norm beside layer norms, with CLS": dataclasses.replace(
        TINY, qk_norm=True, select="full", act="gelu_tanh"
    ),
}


def network(config):
    fields = network_.to_hf(config)
    return hf.transformers.InternVLVisionModel(
        hf.transformers.InternVLVisionConfig(**fields, **hf.ATTENTION)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_site(name):
    config = CONFIGS[name]
    theirs = hf.random(network(config))
    build = lambda: config.build(rngs=nnx.Rngs(0))  # noqa: E731
    ours = towers.transfer(build, network_.vision("tower", "ours"), theirs, "tower.")
    modules = {
        "vision.attn_out": "encoder.layer.{i}.attention (output)",
        "vision.mlp.out": "encoder.layer.{i}.mlp (output)",
    }
    pixels = hf.torch.from_numpy(PIXELS.transpose(0, 3, 1, 2))
    sites = network_.SITES | modules
    out, want = towers.hooked(theirs, sites, pixels)
    layers = theirs.encoder.layer
    for site, scale in (("vision.attn_out", "lambda_1"), ("vision.mlp.out", "lambda_2")):
        factors = [getattr(layer, scale).detach().numpy() for layer in layers]
        want[site] = [x * f for x, f in zip(want[site], factors, strict=True)]
    got, tensors = towers.run(ours, sites, np.ones((3, 17), bool), PIXELS)
    for site in sites:
        wanted = np.stack(want[site]) if len(want[site]) > 1 else want[site][0]
        towers.assert_close(tensors[site].reshape(wanted.shape), wanted, site)
    first = int(config.select == "patch")
    towers.assert_close(got, out.last_hidden_state[:, first:].numpy(), "features")
    assert config.feature_tokens == got.shape[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_comes_back(name):
    problems: list[str] = []
    fields = network_.read(network(CONFIGS[name]).config.to_dict(), problems)
    assert network_.config(fields, select=CONFIGS[name].select) == CONFIGS[name]
    assert not problems
    network_.read({"image_size": [448, 224]}, problems)
    assert "image_size=[448, 224] is not a square" in problems[0]
