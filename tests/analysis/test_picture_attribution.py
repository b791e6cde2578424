"""Attributions of patches against algebra and loops of runs, on squares, tiles and free grids."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families, sites, tokens
from mllm_jax.analysis import picture_attribution as pa
from tests.helpers import qwen, random_inputs, tiny

RNG = np.random.default_rng(0)
EMBED = {"x": mj.keep(sites.lm.embed)}


def weighed(out, weight):
    """A metric that is linear in the embeddings."""
    return (out["x"] * weight).sum((1, 2))


def word(out):
    return out.logits[:, 3]


@pytest.fixture(scope="module")
def batch(make_batch):
    """Two pictures in the first row, none in the second, one in the third."""
    return make_batch(images=(2, 0, 1), words=(5, 9, 7), pad="left", fill=1)


@pytest.fixture(scope="module")
def linear(tiny_model, batch):
    """A linear metric with gates at lm.embed, and what each token contributes to it."""
    weight = RNG.normal(size=(*batch.ids.shape, tiny_model.config.lm.width)).astype(np.float32)
    metric = jax.tree_util.Partial(weighed, weight=weight)
    embedded = np.asarray(mj.run(tiny_model, batch, None, EMBED)["x"])
    is_image = np.asarray(batch.tokens.kind) == tokens.CODE["image"]
    embedded = np.where(is_image[..., None], embedded, 0)
    mean = embedded.sum(1, keepdims=True) / np.maximum(is_image.sum(1), 1)[:, None, None]
    parts = np.where(is_image, (weight * (embedded - mean)).sum(-1), 0)
    return pa.GatedPicture.of(metric, tiny_model, batch, captures=EMBED), parts


def test_of_a_linear_metric_all_are_exact(linear):
    gated, parts = linear
    for found in (
        pa.gradient_times_input(gated),
        pa.integrated_gradients(gated, steps=3),
        pa.occlusion(gated),
    ):
        np.testing.assert_allclose(found.values, parts, rtol=1e-4, atol=1e-4)
        assert (parts[0] != 0).sum() == 2 * (parts[2] != 0).sum() > 0 and not parts[1].any()


def test_windows_close_the_neighbours_in_the_same_tile(linear, batch):
    gated, parts = linear
    map_, want = batch.tokens, np.zeros_like(parts)
    for b, t in np.argwhere(parts):
        for u in range(parts.shape[1]):
            near = parts[b, u] and map_.tile[b, u] == map_.tile[b, t]
            if near and all(abs(getattr(map_, n)[b, u] - getattr(map_, n)[b, t]) <= 1 for n in ("row", "column")):  # fmt: skip
                want[b, t] += parts[b, u]
    np.testing.assert_allclose(pa.occlusion(gated, window=3).values, want, rtol=1e-4, atol=1e-4)
    for window in (0, 2):
        with pytest.raises(ValueError, match=f"window={window}: .* has an odd side"):
            pa.occlusion(gated, window=window)


def test_maps_lie_on_the_grids_of_the_tiles(linear, batch, tiny_config):
    gated, parts = linear
    found, side = pa.gradient_times_input(gated), tiny_config.token_grid
    maps = found.maps(0)
    assert set(maps) == {0, 1} and set(found.maps(2)) == {0} and found.maps(1) == {}
    map_ = batch.tokens
    for b, t in np.argwhere(parts):
        values = found.maps(int(b))[int(map_.tile[b, t])]
        assert values.shape == (side, side)
        at = int(map_.row[b, t]), int(map_.column[b, t])
        np.testing.assert_allclose(values[at], parts[b, t], rtol=1e-4, atol=1e-4)


def test_curves_delete_and_insert_the_strongest_first(linear):
    gated, parts = linear
    found = pa.gradient_times_input(gated)
    curves = pa.curves(gated, found.values, steps=4, draws=3)
    full = found.metric
    for row in (0, 2):
        own = np.sort(parts[row][parts[row] != 0])[::-1]
        counts = [len(own) * step // 4 + (len(own) * step % 4 > 0) for step in range(5)]
        gone = np.array([own[:count].sum() for count in counts])
        np.testing.assert_allclose(curves.deletion[row], full[row] - gone, rtol=1e-4, atol=1e-3)
        inserted = full[row] - own.sum() + gone
        np.testing.assert_allclose(curves.insertion[row], inserted, rtol=1e-4, atol=1e-3)
        assert (
            curves.area(curves.deletion)[row] < curves.area(curves.random_deletion)[:, row]
        ).all()
        assert (
            curves.area(curves.insertion)[row] > curves.area(curves.random_insertion)[:, row]
        ).all()
    np.testing.assert_allclose(curves.deletion[1], full[1], rtol=1e-5)  # it has no picture
    for random in (curves.random_deletion, curves.random_insertion[..., ::-1]):
        np.testing.assert_allclose(random[..., 0], np.tile(full, (3, 1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(curves.share, [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("at", ["lm.embed", "pixels"])
def test_integrated_gradients_are_complete(at, tiny_model, batch):
    gated = pa.GatedPicture.of(word, tiny_model, batch, at=at)
    found = pa.integrated_gradients(gated, steps=64)
    closed = pa.evaluate(gated, np.zeros((1, *found.values.shape)))[0]
    total = found.readers @ found.values.sum(1)
    assert abs(found.metric - closed)[[0, 2]].min() > 0.03
    np.testing.assert_allclose(
        total, found.metric - closed, atol=0.02 * abs(found.metric - closed).max()
    )
    np.testing.assert_allclose(found.metric, word(mj.run(tiny_model, batch)), rtol=1e-4, atol=1e-4)


def test_occlusion_at_the_embeddings_is_a_loop_of_runs(tiny_model, batch):
    zero = np.zeros(tiny_model.config.lm.width, np.float32)
    found = pa.occlusion(pa.GatedPicture.of(word, tiny_model, batch, baseline=zero))
    clean = word(mj.run(tiny_model, batch))
    for b, t in np.argwhere(np.asarray(batch.tokens.kind) == tokens.CODE["image"]):
        mask = np.zeros(batch.ids.shape, bool)
        mask[b, t] = True
        off = word(mj.run(tiny_model, batch, mj.ablate(sites.lm.embed, where=mask)))
        np.testing.assert_allclose(found.values[b, t], (clean - off)[b], atol=1e-4)


def test_occlusion_at_the_pixels_is_a_loop_of_runs(tiny_model, batch):
    found = pa.occlusion(pa.GatedPicture.of(word, tiny_model, batch, at="pixels"))
    clean, config = word(mj.run(tiny_model, batch)), tiny_model.config.vision
    assert found.values.shape == (4, 1 + config.grid**2)
    for tile, row in ((0, 0), (1, 0), (2, 2)):
        (values,) = (m for number, m in found.maps(row).items() if number == batch.tile[tile])
        assert values.shape == (config.grid, config.grid)
        for y in range(config.grid):
            for x in range(0, config.grid, 2):
                pixels = np.array(batch.pixels)
                size = config.patch
                pixels[tile, y * size : (y + 1) * size, x * size : (x + 1) * size] = 0
                off = word(mj.run(tiny_model, batch.replace(pixels=pixels)))
                np.testing.assert_allclose(values[y, x], (clean - off)[row], atol=1e-4)
    assert not found.values[3].any() and np.abs(found.values[:3, 1:]).min() > 0


@pytest.fixture(scope="module")
def free():
    """A model whose pictures keep their shape, and two of them."""
    config = families.FAMILIES["qwen2_5_vl"].config.tiny()
    pictures = [[tiny.picture(0, 16, 32)], [tiny.picture(1, 24, 16)]]
    batch = qwen.processor(config)(pictures, ["<image> what is it ?"] * 2)
    return random_inputs.random_model(config), batch


@pytest.mark.slow
def test_a_free_grid(free):
    model, batch = free
    gated = pa.GatedPicture.of(word, model, batch, at="pixels")
    occluded, clean = pa.occlusion(gated), word(mj.run(model, batch))
    np.testing.assert_allclose(occluded.metric, clean, rtol=1e-4, atol=1e-4)
    map_ = model.token_maps(batch)["vision"]
    for row in (0, 1):
        (grid,) = occluded.maps(row).values()
        assert grid.shape == tuple(batch.grid[row]) and np.isfinite(grid).all()
        assert (occluded.maps(row)[0] != 0).all()
        for at in (0, 5, int(batch.grid[row].prod()) - 1):
            pixels = np.array(batch.pixels)
            pixels[row, at] = 0
            off = word(mj.run(model, batch.replace(pixels=pixels)))
            place = int(map_.row[row, at]), int(map_.column[row, at])
            np.testing.assert_allclose(occluded.maps(row)[0][place], (clean - off)[row], atol=1e-4)


def test_rows_that_share_a_tile(tiny_model, make_batch):
    """A tile has the sum of what it contributes to its rows."""
    rows = {"images": (1, 1, 1), "words": (9, 9, 9), "length": 13, "fill": 1}
    apart, shared = make_batch(**rows), make_batch(**rows)
    apart.pixels[1] = apart.pixels[0]
    index = shared.image_token_index
    index[1] = np.where(index[1] >= 0, index[1] - tiny_model.config.image_tokens, -1)
    shared.is_real_tile[1] = False
    one, two = (
        pa.occlusion(pa.GatedPicture.of(word, tiny_model, b, at="pixels")) for b in (shared, apart)
    )
    np.testing.assert_allclose(one.values[0], two.values[:2].sum(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(one.values[2], two.values[2], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(one.maps(0)[0], one.maps(1)[0])


def test_errors(tiny_model, batch, make_batch):
    with pytest.raises(ValueError, match='at="pixel" is not one of lm.embed, pixels'):
        pa.GatedPicture.of(word, tiny_model, batch, at="pixel")
    with pytest.raises(ValueError, match="the batch has no picture"):
        pa.GatedPicture.of(word, tiny_model, make_batch(images=(0, 0), words=(4, 3)))
    with pytest.raises(ValueError, match="takes no baseline"):
        pa.GatedPicture.of(word, tiny_model, batch, baseline=np.zeros(32), at="pixels")
    features = batch.replace(features=np.zeros((4, 16, 32), np.float32))
    with pytest.raises(ValueError, match="features in place of its pixels"):
        pa.GatedPicture.of(word, tiny_model, features, at="pixels")
