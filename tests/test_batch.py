"""Where the tokens of a picture stand on it, however it is cut."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from tests.helpers import study_checkpoints

# By family: the (height, width) of a picture that no image processor scales, the tokens of its
# parts in rows and columns, and those of the whole.
PICTURES = {
    "qwen2.5-vl": ((24, 40), (0, 0), (3, 5)),
    "mistral3": ((24, 40), (0, 0), (3, 5)),
    "paligemma": ((24, 24), (0, 0), (4, 4)),
    "llava-next": ((48, 48), (8, 8), (4, 4)),
    "internvl": ((24, 48), (2, 4), (2, 2)),
    "idefics3": ((72, 120), (6, 10), (2, 2)),
}


def gray(batch, position: int) -> float:
    """The mean of the pixels that an image token of the first row stands for."""
    config, pixels = batch.processor.config, batch.pixels
    tile, square = divmod(int(batch.image_token_index[0, position]), config.tile_tokens(batch))
    if config.tile_side is None:
        count = config.merge**2
        return float(pixels[tile, square * count : (square + 1) * count].mean())
    side, grid = config.vision.image_size, config.token_grid
    row, column = divmod(square, grid)
    step = side // grid
    return float(
        pixels[tile, row * step : (row + 1) * step, column * step : (column + 1) * step].mean()
    )


@pytest.mark.parametrize("family", PICTURES)
def test_tokens_lie_as_the_picture_does(family, tmp_path):
    """The pixels of the tokens, put together, are the picture."""
    size, parts, whole = PICTURES[family]
    processor = study_checkpoints.processor(family, tmp_path / "processor")
    values = np.add.outer(5 * np.arange(size[0]), np.arange(size[1])) % 240
    picture = PIL.Image.fromarray(np.repeat(values[..., None], 3, -1).astype(np.uint8))
    smooth = np.add.outer(2 * np.arange(size[0]), np.arange(size[1]))
    gradient = PIL.Image.fromarray(
        np.repeat(smooth[..., None], 3, -1).clip(0, 255).astype(np.uint8)
    )
    layout = processor.layout(size)
    for image, shape, number in ((gradient, whole, 0), (picture, parts, 1)):
        batch = processor([image], ["what ?"])
        positions = layout.grids(batch.tokens)[number]
        assert positions.shape == shape
        if not positions.size:
            continue
        found = np.array([[gray(batch, at) for at in row] for row in positions])
        rows, columns = shape
        blocks = np.asarray(image, float)[..., 0].reshape(
            rows, size[0] // rows, columns, size[1] // columns
        )
        want = blocks.mean((1, 3))
        # Normalised pixels are a linear function of the gray values.
        closeness = np.corrcoef(found.ravel(), want.ravel())[0, 1]
        assert closeness > (0.99 if number == 0 else 1 - 1e-9)


def test_the_row_of_a_batch_is_the_one_that_is_asked_for(tmp_path):
    processor = study_checkpoints.processor("qwen2.5-vl", tmp_path / "processor")
    images = [PIL.Image.new("RGB", size) for size in ((40, 24), (16, 48))]
    batch = processor(images, ["a", "a longer one"])
    for row, (image, shape) in enumerate(zip(images, ((3, 5), (6, 2)), strict=True)):
        whole, parts = processor.layout(image.size[::-1]).grids(batch.tokens, row)
        assert whole.shape == shape and not parts.size
        assert (np.diff(whole.ravel()) == 1).all()
        assert batch.tokens.column[row, whole].tolist() == [list(range(shape[1]))] * shape[0]
