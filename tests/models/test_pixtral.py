"""Pixtral's tower is that of transformers, row by row and in blocks of patches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from mllm_jax.checkpoints.networks import pixtral as network_
from mllm_jax.models import pixtral
from tests.helpers import hf, towers

TINY = pixtral.PixtralConfig.tiny()
GRIDS = np.array([(4, 6), (8, 4), (0, 0), (2, 10)], np.int32)
REAL, PLACES, SIDE = [0, 1, 3], 40, 4
SIZES = [tuple(int(n) * SIDE for n in GRIDS[i]) for i in REAL]


def pictures():
    """Padded to one size, channels first; padding would be noticed."""
    rng = np.random.default_rng(0)
    pixels = np.full((len(REAL), 3, 8 * SIDE, 10 * SIDE), 1e3, np.float32)
    for picture, (height, width) in zip(pixels, SIZES, strict=True):
        picture[:, :height, :width] = rng.normal(size=(3, height, width))
    return pixels


def patches(merge):
    """[I, P, pixel] of the pictures, and for each picture the order of its patches by rows."""
    x, orders = np.full((len(GRIDS), PLACES, 3 * SIDE**2), 9, np.float32), {}
    for tile, picture in zip(REAL, pictures(), strict=True):
        rows, columns = GRIDS[tile]
        places = [
            (r + dr, c + dc)
            for r in range(0, rows, merge) for c in range(0, columns, merge)
            for dr in range(merge) for dc in range(merge)
        ]  # fmt: skip
        for at, (r, c) in enumerate(places):
            patch = picture[:, r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE]
            x[tile, at] = patch.reshape(-1)
        orders[tile] = [r * columns + c for r, c in places]
    return x, orders


def network(config):
    fields = network_.to_hf(config)
    return hf.transformers.PixtralVisionModel(
        hf.transformers.PixtralVisionConfig(**fields, **hf.ATTENTION)
    )


@pytest.mark.parametrize("merge", [1, 2])
def test_every_site(merge):
    config = dataclasses.replace(TINY, merge=merge, theta=100.0)
    theirs = hf.random(network(config))
    tower = towers.transfer(
        lambda: pixtral.PixtralVision(config, rngs=nnx.Rngs(0)),
        network_.vision("tower", "ours", config),
        theirs,
        "tower.",
    )
    pixels = hf.torch.from_numpy(pictures())
    sizes = hf.torch.tensor(SIZES)
    out, want = towers.hooked(theirs, network_.SITES, pixels, image_sizes=sizes)
    x, orders = patches(merge)
    valid = np.arange(PLACES) < GRIDS.prod(1)[:, None]
    got, tensors = towers.run(tower, network_.SITES, valid, x, GRIDS)
    ends = np.cumsum([0, *(h * w // SIDE**2 for h, w in SIZES)])
    for name in network_.SITES:
        layers = want[name]
        ours = tensors[name] if len(layers) > 1 else tensors[name][None]
        for layer, array in enumerate(layers):
            for n, tile in enumerate(REAL):
                at, count = ends[n] + np.array(orders[tile]), len(orders[tile])
                if name.endswith("pattern"):
                    theirs_ = array[0][:, at][:, :, at]
                    mine = ours[layer, tile][:, :count, :count]
                else:
                    theirs_ = array[0, at]
                    mine = ours[layer, tile, :count].reshape(theirs_.shape)
                towers.assert_close(mine, theirs_, name)
    for n, tile in enumerate(REAL):
        at = ends[n] + np.array(orders[tile])
        towers.assert_close(got[tile, : len(at)], out.last_hidden_state[0, at].numpy(), "features")
    assert np.isfinite(got).all()


def test_config_comes_back():
    problems: list[str] = []
    fields = network_.read(network(TINY).config.to_dict(), problems)
    assert network_.config(fields, merge=1) == TINY
    assert not problems
    network_.read({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, problems)
    assert "two values of rope_theta" in problems[0]
