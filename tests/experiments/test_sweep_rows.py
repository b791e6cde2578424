"""The rows of pictures whose tokens are exchanged, however a picture is read."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from experiments.sweep import study
from mllm_jax import tokens as tok
from tests.helpers import study_checkpoints


def rows_of(family, sizes, count, tmp_path):
    processor = study_checkpoints.processor(family, tmp_path / "processor")
    images = [PIL.Image.new("RGB", (width, height)) for height, width in sizes]
    batch = processor(images, ["what ?"] * len(sizes))
    layouts = [processor.layout(size) for size in sizes]
    return batch, study.picture_rows(batch.tokens, layouts, count)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "mistral3", "idefics3", "internvl", "llava-next"])
def test_rows_share_out_the_image_tokens(family, tmp_path):
    batch, masks = rows_of(family, ((48, 24), (24, 48)), 2, tmp_path)
    image = batch.tokens.kind == tok.CODE["image"]
    np.testing.assert_array_equal(masks.sum(0), image)
    assert masks.any(-1).all()


def test_a_picture_of_more_rows_has_bands_of_them(tmp_path):
    batch, masks = rows_of("qwen2.5-vl", ((24, 40), (48, 16)), 3, tmp_path)
    for b, rows in enumerate((1, 2)):
        for band in range(3):
            found = set(batch.tokens.row[b, masks[band, b]].tolist())
            assert found == set(range(band * rows, band * rows + rows))


def test_rows_go_through_tiles_and_the_whole(tmp_path):
    """The upper half of a picture of 5 x 5 tiles, and of the tile that shows all of it."""
    batch, masks = rows_of("idefics3", ((120, 120), (120, 120)), 2, tmp_path)
    tile, row = batch.tokens.tile[0], batch.tokens.row[0]
    upper = masks[0, 0]
    parts, whole = upper & (tile < 25), upper & (tile == 25)
    assert set(tile[parts].tolist()) == set(range(15))  # 2.5 rows of 5 x 5 tiles
    assert set(row[parts & (tile >= 10)].tolist()) == set(row[whole].tolist()) == {0}
