"""Astronomy: the sky photographs of Stellarium, labelled by its deep-sky catalogue."""

from __future__ import annotations

import functools
import gzip
import io
import re
import struct
from collections.abc import Iterator

import numpy as np
import PIL.Image

from mllm_jax.data import packages
from mllm_jax.data.embedded import recipe

STELLARIUM = packages.Deb(
    "stellarium-data",
    "0.22.2-1",
    "45aaebf39a814acbd6dcccea058c2f5651bcb5635599da03a215feeb51f4d5a5",
    "GPL-2+ (credits by image in the package)",
    "https://stellarium.org",
)
FOLDER = "usr/share/stellarium/nebulae/default/"

# Numbers of Stellarium's enumeration of deep-sky objects.
GALAXIES = {0, 1, 3}
TYPES = {
    6: "an open cluster",
    7: "a globular cluster",
    11: "a planetary nebula",
    **dict.fromkeys((10, 13, 15, 16, 17), "a diffuse nebula"),
}
CATALOGUES = {
    "ngc": 0,
    "n": 0,
    "ic": 1,
    "m": 2,
    "barnard": 4,
    "sh2-": 5,
    "rcw": 7,
    "p": 12,
    "u": 13,
}
# Two objects closer than this may be in each other's picture, so they are one group.
NEIGHBOURS_DEGREES = 1.0


class Catalogue:
    """The entries of `catalog.dat`: gzip, big-endian QDataStream, floats stored as doubles."""

    def __init__(self, packed: bytes):
        self._data = gzip.decompress(packed)
        self._at = 0
        self.version, self.edition = self._text(), self._text()

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], int, str, float, float]]:
        """Yield (catalogue numbers, type, morphology, right ascension, declination) in radians."""
        while self._at < len(self._data):
            _, ascension, declination, _, _, kind = self._numbers("I4dI")
            morphology = self._text()
            self._numbers("2dI6d")  # size, orientation, redshift, parallax, distance
            numbers = self._numbers("14I")
            self._text()
            self._numbers("2I")
            for _ in range(7):
                self._text()
            self._numbers("5I")
            yield numbers, kind, morphology, ascension, declination

    def _numbers(self, fields: str) -> tuple:
        values = struct.unpack_from(f">{fields}", self._data, self._at)
        self._at += struct.calcsize(f">{fields}")
        return values

    def _text(self) -> str:
        (size,) = self._numbers("I")
        if size == 0xFFFFFFFF:
            return ""
        self._at += size
        return self._data[self._at - size : self._at].decode("utf-16-be")


def label_of(kind: int, morphology: str) -> str | None:
    """Return the label of a catalogue entry; None if it has none."""
    if kind in GALAXIES:
        spiral = re.match(r"\(?[R']*\)?S(?!0|A0|B0|AB0|.*0)|^[1-9]$", morphology)
        return "a spiral galaxy" if spiral else None
    return TYPES.get(kind)


def sky_groups(directions: np.ndarray, degrees: float) -> list[int]:
    """Group objects that lie closer together than `degrees`, chains included.

    Args:
      directions: float64[N, 2], right ascension and declination in radians.
      degrees: The distance.

    Returns:
      The index of the first object of each object's group.
    """
    ascension, declination = directions.T
    unit = np.stack(
        [
            np.cos(declination) * np.cos(ascension),
            np.cos(declination) * np.sin(ascension),
            np.sin(declination),
        ],
        axis=1,
    )
    near = unit @ unit.T > np.cos(np.radians(degrees))
    group = np.arange(len(unit))
    while True:  # every object takes the lowest number among its neighbours until nothing changes
        lowest = np.where(near, group[None], len(unit)).min(axis=1)
        if (lowest == group).all():
            return group.tolist()
        group = lowest


def pictures() -> Iterator[recipe.Candidate]:
    """Yield the photographs whose object is in the catalogue and has a label."""
    files = STELLARIUM.members(
        lambda name: name.startswith(FOLDER) and name.endswith((".png", "catalog.dat"))
    )
    entries: dict[tuple[int, int], tuple[int, str, list[float]]] = {}
    for numbers, kind, morphology, *direction in Catalogue(files.pop(FOLDER + "catalog.dat")):
        for column in set(CATALOGUES.values()):
            if numbers[column]:
                entries.setdefault((column, numbers[column]), (kind, morphology, direction))
    matched = {}
    for path in sorted(files):
        name = path.removeprefix(FOLDER).removesuffix(".png")
        match = re.match(r"([a-z]+(?:2-)?)(\d+)", name)
        key = match and (CATALOGUES.get(match[1]), int(match[2]))
        if key in entries:
            matched[name] = (path, *entries[key])
    groups = sky_groups(np.array([p[3] for p in matched.values()]), NEIGHBOURS_DEGREES)
    for group, (name, (path, kind, morphology, _)) in zip(groups, matched.items(), strict=True):
        if label := label_of(kind, morphology):
            yield recipe.Candidate(
                name=name,
                label=label,
                group=f"sky {group}",
                source=f"{STELLARIUM.name}: {path.removeprefix('usr/share/stellarium/')}",
                licence=STELLARIUM.licence,
                image=functools.partial(_picture, files[path]),
            )


def _picture(encoded: bytes) -> PIL.Image.Image:
    return recipe.squared(PIL.Image.open(io.BytesIO(encoded)), "black")


RECIPE = recipe.Recipe(
    name="astronomy",
    families=(
        recipe.Family(
            (
                "a spiral galaxy",
                "a globular cluster",
                "an open cluster",
                "a planetary nebula",
                "a diffuse nebula",
            ),
            test=13,
            train=90,
        ),
    ),
    sources=(STELLARIUM,),
    parts=(pictures,),
    note="label from the deep-sky catalogue, matched by M/NGC/IC/Sh2/UGC/PGC number",
)
