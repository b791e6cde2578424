"""Heat maps stand on the picture as the tower saw it, in its shape and in the colours of the bar."""

from __future__ import annotations

import matplotlib
import numpy as np
import PIL.Image
import pytest

from mllm_jax.families.llava_next.model import LlavaNextConfig
from mllm_jax.interventions.attention_maps import picture_maps
from mllm_jax.report import heat_maps
from tests.helpers import tiny


def colour(level):
    return np.round(255 * np.array(matplotlib.colormaps[heat_maps.COLOURS](level)[:3]))


def test_cells_have_the_colours_of_the_bar_and_the_picture_its_shape():
    picture = PIL.Image.new("RGB", (60, 20), (200, 10, 10))
    values = np.array([[0.0, 1.0, np.nan], [0.5, 0.25, 0.75]])
    shown = heat_maps.overlay(picture, values)
    assert shown.width == 3 * shown.height
    pixels = np.array(shown)
    for (row, column), value in np.ndenumerate(values):
        down = (2 * row + 1) * shown.height // 4
        across = (2 * column + 1) * shown.width // 6
        want = (50, 2, 2) if np.isnan(value) else colour(value)
        np.testing.assert_array_equal(pixels[down, across], want)
    np.testing.assert_array_equal(pixels[0, 0], (200, 10, 10))  # the picture between the squares


def test_the_scale_is_one_for_all_tiles_and_may_be_negative():
    maps = {0: np.array([[0.25]]), 3: np.array([[-1.0, np.nan]])}
    assert heat_maps.bounds_of(maps) == (-1.0, 0.25)
    assert heat_maps.bounds_of({0: np.zeros((2, 2))}) == (0.0, 1.0)


def test_each_tile_of_a_row_has_its_own_map():
    config = LlavaNextConfig.tiny()
    white = PIL.Image.new("RGB", (32, 10), "white")  # set into a square: bars above and below
    batch = tiny.processor(config)([white, white], ["what ?", "which ?"])
    maps = picture_maps(np.ones(batch.ids.shape[1]), batch.tokens, 1)
    shown = heat_maps.overlays(batch, maps, row=1)
    assert set(shown) == set(maps) and len(maps) > 1
    n = config.token_grid
    for number, picture in shown.items():
        middle = ((np.arange(n) + 0.5) * picture.height / n).astype(int)
        pixels = np.array(picture)[np.ix_(middle, middle)]
        own = np.flatnonzero((batch.tokens.tile[1] == number) & (batch.tokens.row[1] >= 0))
        read = np.zeros((n, n), bool)
        read[batch.tokens.row[1, own], batch.tokens.column[1, own]] = True
        np.testing.assert_array_equal((pixels == colour(1.0)).all(-1), read)
    assert len(heat_maps.figure(batch, maps, 1).axes) >= len(maps) + 1
    with pytest.raises(ValueError, match="row 0 reads no tile 77"):
        heat_maps.overlays(batch, {77: np.ones((1, 1))})
    with pytest.raises(ValueError, match="no pictures to draw on"):
        heat_maps.overlays(batch.replace(processor=None), maps)
