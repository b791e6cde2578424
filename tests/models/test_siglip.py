"""SigLIP's tower is that of transformers, whole and at a hidden layer; so is Idefics3's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from mllm_jax.checkpoints.networks import siglip as network_
from mllm_jax.families.idefics3 import config as idefics3
from mllm_jax.models import siglip
from tests.helpers import hf, towers

TINY = siglip.SiglipConfig.tiny()


def siglip_network(config):
    fields = network_.to_hf(dataclasses.replace(config, feature_layer=None))
    return hf.transformers.SiglipVisionModel(
        hf.transformers.SiglipVisionConfig(**fields, **hf.ATTENTION)
    )


def idefics3_network(config, kind="idefics3"):
    module = pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}")
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    fields = network_.to_hf(config, f"{kind}_vision")
    made = getattr(hf.transformers, f"{name}VisionConfig")(**fields, **hf.ATTENTION)
    return getattr(module, f"{name}VisionTransformer")(made)


def ours(config, network):
    def is_unused(key):
        layer = key.split(".")[3] if ".layers." in key else "-1"
        after = int(layer) >= config.run_layers or "post_layernorm" in key
        return config.feature_layer is not None and after

    table = network_.vision("tower", "ours")
    build = lambda: config.build(rngs=nnx.Rngs(0))  # noqa: E731
    return towers.transfer(build, table, network, "tower.", is_unused)


def check(config, network, want_features):
    sites, side = network_.SITES, config.image_size
    pictures = np.random.default_rng(0).normal(size=(3, side, side, 3)).astype(np.float32)
    pixels = hf.torch.from_numpy(pictures.transpose(0, 3, 1, 2))
    out, want = towers.hooked(network, sites, pixels, output_hidden_states=True)
    tokens = np.ones((3, config.feature_tokens), bool)
    got, tensors = towers.run(ours(config, network), sites, tokens, pictures)
    for name in sites:
        theirs = np.stack(want[name]) if len(want[name]) > 1 else want[name][0]
        theirs = theirs if name == "vision.embed" else theirs[: config.run_layers]
        towers.assert_close(tensors[name].reshape(theirs.shape), theirs, name)
    towers.assert_close(got, want_features(out).numpy(), "features")


@pytest.mark.parametrize(("act", "side"), [("gelu_tanh", 24), ("gelu", 29)])
def test_the_whole_tower_at_every_site(act, side):
    """Patches of 6 pixels leave 5 of 29 over, as those of 14 leave 6 of 384."""
    config = dataclasses.replace(TINY, act=act, eps=1e-3, image_size=side)
    check(config, hf.random(siglip_network(config)), lambda out: out.last_hidden_state)


@pytest.mark.parametrize(("at", "run_layers"), [(-2, 2), (-1, 3), (1, 1)])
def test_a_hidden_layer_without_the_last_norm(at, run_layers):
    config = dataclasses.replace(TINY, feature_layer=at)
    assert config.run_layers == run_layers
    check(config, hf.random(siglip_network(config)), lambda out: out.hidden_states[at])


@pytest.mark.parametrize(("kind", "side"), [("idefics3", 24), ("smolvlm", 24)])
def test_idefics3_on_full_tiles(kind, side):
    config = dataclasses.replace(TINY, image_size=side)
    check(config, hf.random(idefics3_network(config, kind)), lambda out: out.last_hidden_state)


@pytest.mark.parametrize("kind", ["siglip", "idefics3"])
def test_config_comes_back(kind):
    made = siglip_network(TINY) if kind == "siglip" else idefics3_network(TINY)
    problems: list[str] = []
    table = network_.FIELDS if kind == "siglip" else idefics3.VISION
    assert network_.config(network_.read(made.config.to_dict(), problems, table)) == TINY
    assert not problems
    assert network_.read({"hidden_sise": 3}, problems) and "hidden_sise" in problems[0]
