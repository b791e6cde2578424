"""Maps of attention or attribution on pictures, as the vision tower saw them."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
import PIL.Image
from matplotlib import cm, colors
from matplotlib.figure import Figure

from mllm_jax.batch import Batch
from mllm_jax.report import style
from mllm_jax.typing import Float

COLOURS = "viridis"
_CELL = 12  # pixels of the side of a cell, at least
_INSET = 0.25  # of a cell on each side, through which the picture is seen

Map = Float[np.ndarray, "rows columns"]


def overlay(
    picture: PIL.Image.Image, values: Map, bounds: tuple[float, float] | None = None
) -> PIL.Image.Image:
    """Return a picture in its own shape, with a square in the colour of its value in each cell.

    The squares are opaque, so that they match a colour bar. Cells with NaN, which the model does
    not read, are dark.

    Args:
      picture: The picture.
      values: A value for each cell of a grid over the picture.
      bounds: The values of the first and the last colour; by default 0, or the smallest value if
        it is negative, and the largest.
    """
    low, high = bounds or bounds_of({0: values})
    rows, columns = values.shape
    factor = max(1, -(-_CELL * rows // picture.height), -(-_CELL * columns // picture.width))
    height, width = picture.height * factor, picture.width * factor
    shown = np.array(picture.convert("RGB").resize((width, height), PIL.Image.Resampling.NEAREST))
    level = np.clip((values - low) / max(high - low, 1e-30), 0, 1)
    colours = (255 * matplotlib.colormaps[COLOURS](level)[..., :3]).round().astype(np.uint8)
    for (row, column), value in np.ndenumerate(values):
        ends = (row * height / rows, (row + 1) * height / rows), (
            column * width / columns, (column + 1) * width / columns,
        )  # fmt: skip
        inset = 0 if np.isnan(value) else _INSET
        cell = tuple(slice(round(a + inset * (b - a)), round(b - inset * (b - a))) for a, b in ends)
        shown[cell] = shown[cell] // 4 if np.isnan(value) else colours[row, column]
    return PIL.Image.fromarray(shown)


def overlays(batch: Batch, maps: Mapping[int, Map], row: int = 0) -> dict[int, PIL.Image.Image]:
    """Return the tiles of a row with their maps, in colours of one scale.

    Args:
      batch: The batch, made by a processor.
      maps: A map for each tile of the row, such as `AttentionMap.maps(row)[tile][layer, head]` or
        `PatchAttribution.maps(row)[tile]`.
      row: The row.

    Raises:
      ValueError: The batch has no pictures, or the row has no such tile.
    """
    if batch.processor is None or not np.size(batch.pixels):
        raise ValueError("the batch has no pictures to draw on: it needs a processor and pixels")
    config = batch.processor.config
    readers, numbers = np.asarray(config.readers(batch))[row], np.asarray(batch.tile)
    bounds, shown = bounds_of(maps), {}
    for number, values in maps.items():
        at = np.flatnonzero(readers & (numbers == number))
        if not len(at):
            raise ValueError(f"row {row} reads no tile {number}")
        picture = batch.processor.tile_picture(batch, int(at[0]))
        side = 0 if config.tile_side is None else config.token_grid
        shown[number] = overlay(picture, _filled(values, side), bounds)
    return shown


def bounds_of(maps: Mapping[int, Map]) -> tuple[float, float]:
    """Return the ends of the colour scale of several maps: 0 or less, and the largest value."""
    values = np.concatenate([np.ravel(values) for values in maps.values()])
    finite = values[np.isfinite(values)]
    return float(finite.min(initial=0)), float(finite.max(initial=0)) or 1.0


@style.styled
def figure(
    batch: Batch, maps: Mapping[int, Map], row: int = 0, *, label: str = "attention"
) -> Figure:
    """Draw the tiles of a row with their maps, and one colour bar for all.

    Args:
      batch: See `overlays`.
      maps: See `overlays`.
      row: See `overlays`.
      label: The label of the colour bar.
    """
    shown = overlays(batch, maps, row)
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    drawn = Figure(figsize=(2.6 * columns + 0.9, 2.8 * rows))
    grid = drawn.subplots(rows, columns, squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    for ax, (number, picture) in zip(grid.flat, shown.items(), strict=False):
        ax.imshow(picture)
        ax.set_title(f"tile {number}")
    low, high = bounds_of(maps)
    scale = cm.ScalarMappable(colors.Normalize(low, high), COLOURS)
    bar = drawn.colorbar(scale, ax=grid, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return drawn


def _filled(values: Map, side: int) -> Map:
    """Pad a map with the last rows and columns of its square, which the model does not read."""
    rows, columns = values.shape
    missing = (0, max(0, side - rows)), (0, max(0, side - columns))
    return np.pad(np.asarray(values, np.float64), missing, constant_values=np.nan)
