"""The projector is HF's, and LLaVA's own where HF has none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mllm_jax.batch import Batch
from mllm_jax.families.llava import model as llava
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.models import projector
from tests.helpers import hf


def config_of(**fields) -> llava.LlavaConfig:
    config = llava.LlavaConfig.tiny()
    return dataclasses.replace(
        config, projector=dataclasses.replace(config.projector, **fields, fold=1)
    )


def with_features(batch: Batch, config: llava.LlavaConfig, seed: int = 0) -> Batch:
    """A batch that reads features instead of pixels."""
    shape = (len(batch.is_real_tile), config.vision.grid**2, config.vision.width)
    features = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return batch.replace(features=features)


@pytest.mark.parametrize(("bias", "act"), [(True, "gelu"), (False, "gelu_tanh"), (True, "relu")])
def test_two_maps_as_hf(bias, act, make_batch):
    config = config_of(bias=bias, act=act)
    theirs = hf.random(hf.modeling_llava.LlavaMultiModalProjector(hf.llava_config(config)))
    ours = hf.transfer(config, theirs, "multi_modal_projector.")
    batch = with_features(make_batch(config, images=(1, 2)), config)
    names = ("projector.act", "projector.out")
    want = hf.tensors(theirs, names, "multi_modal_projector.", image_features=batch.features)
    hf.assert_equal(ours, batch, want)


@pytest.mark.parametrize("depth", [1, 3])
def test_another_depth_as_the_original(depth, make_batch):
    # LLaVA's own builder: nn.Linear, then (nn.GELU, nn.Linear) for "mlpNx_gelu".
    config = config_of(depth=depth)
    E, D = config.vision.width, config.lm.width
    modules = [hf.torch.nn.Linear(E, D)]
    for _ in range(depth - 1):
        modules += [hf.torch.nn.GELU(), hf.torch.nn.Linear(D, D)]
    theirs = hf.random(hf.torch.nn.Sequential(*modules))
    prefix = "model.mm_projector" + (".0." if depth == 1 else ".")
    weights = theirs[0] if depth == 1 else theirs
    ours = hf.transfer(config, weights, prefix)
    batch = with_features(make_batch(config, images=(1, 2)), config)
    x, acts = hf.torch.from_numpy(batch.features), []
    with hf.torch.no_grad():
        for module in theirs:
            x = module(x)
            acts += [x.numpy()] if isinstance(module, hf.torch.nn.GELU) else []
    want = {"projector.out": x.numpy()} | ({"projector.act": np.stack(acts)} if acts else {})
    hf.assert_equal(ours, batch, want)
    assert ("projector.act" in site_shapes(ours, batch)) == (depth > 1)


@pytest.mark.parametrize(("grid", "side"), [(4, 2), (6, 2), (6, 3), (4, 1)])
def test_fold_puts_neighbours_side_by_side(grid, side):
    x = np.random.default_rng(0).normal(size=(2, grid * grid, 5)).astype(np.float32)
    want = np.zeros((2, (grid // side) ** 2, side * side * 5), np.float32)
    for image in range(2):
        for row in range(grid):
            for column in range(grid):
                token = row // side * (grid // side) + column // side
                place = row % side * side + column % side
                patch = x[image, row * grid + column]
                want[image, token, place * 5 : (place + 1) * 5] = patch
    np.testing.assert_array_equal(projector.fold(x, side), want)
