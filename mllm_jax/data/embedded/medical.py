"""Medical: magnetic-resonance slices of the brain, of two templates.

Training slices come from the MNI152 template of nilearn. Test slices come from depths at a distance
from those of training: tissue maps from the same template, T1 slices from another brain (ch2bet of
MRIcron; both brains come without the skull).
The template is symmetric, so a sagittal slice on the right is the mirror image of the one on the
left: only the left half is used.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator
from typing import cast

import nibabel
import numpy as np
import PIL.Image

from mllm_jax.data import packages
from mllm_jax.data.embedded import recipe

NILEARN = packages.Wheel(
    "nilearn",
    "0.14.1",
    "BSD-3-Clause (package); MNI ICBM152 template: McConnell BIC's own notice",
    "https://nilearn.github.io",
)
MRICRON = packages.Deb(
    "mricron-data",
    "1.2.20211006+dfsg-4",
    "d40aa0ed66cf89bf6cafa049ad3884703c9d975c2ee2737525b7196528df9d6f",
    "BSD-3-Clause",
    "https://github.com/neurolabusc/MRIcron",
)
CH2BET = "usr/share/mricron/templates/ch2bet.nii.gz"
MAPS = {"t1": "T1 scan", "gm": "grey matter map", "wm": "white matter map"}

# Millimetres in MNI space by axis: plane, first and last depth, and the test blocks within.
PLANES = (
    ("a sagittal", (-64, 0), ((-34, -22),)),
    ("a coronal", (-94, 62), ((-70, -56), (-14, 0), (36, 50))),
    ("an axial", (-48, 68), ((-30, -20), (8, 20), (46, 56))),
)
GAP = 6


def depths(axis: int, split: str) -> list[int]:
    """Return the depths in millimetres of a split's slices, GAP or more away from the other's."""
    _, (first, last), blocks = PLANES[axis]
    margin = GAP if split == "train" else 0

    def in_block(depth: int) -> bool:
        return any(low - margin < depth < high + margin for low, high in blocks)

    return [depth for depth in range(first, last + 1) if in_block(depth) == (split == "test")]


def slice_at(volume: np.ndarray, affine: np.ndarray, axis: int, depth: float) -> np.ndarray:
    """Return the plane of a volume at `depth` millimetres, front or top of the head upwards."""
    index = round((depth - affine[axis, 3]) / affine[axis, axis])
    return np.take(volume, index, axis=axis).T[::-1]


def mni_slices() -> Iterator[recipe.Candidate]:
    """Yield the slices of the MNI152 template of nilearn."""
    for short in MAPS:
        ending = f"mni_icbm152_{short}_tal_nlin_sym_09a_converted.nii.gz"
        volume = cast(nibabel.Nifti1Image, nibabel.load(NILEARN.file(ending)))
        splits = ("train",) if short == "t1" else ("train", "test")
        yield from _slices(volume, short, NILEARN, ending, splits)


def ch2_slices() -> Iterator[recipe.Candidate]:
    """Yield the T1 slices of the brain ch2bet of MRIcron, for testing."""
    packed = MRICRON.members(CH2BET.__eq__)[CH2BET]
    volume = nibabel.Nifti1Image.from_bytes(gzip.decompress(packed))
    yield from _slices(volume, "t1", MRICRON, CH2BET.rsplit("/", 1)[-1], ("test",))


def _slices(
    image: nibabel.Nifti1Image,
    short: str,
    package: packages.Wheel | packages.Deb,
    file: str,
    splits: tuple[str, ...],
) -> Iterator[recipe.Candidate]:
    volume = np.asarray(image.dataobj)
    white = np.percentile(volume[volume > 0], 99.5)
    volume = np.clip(volume / white * 255, 0, 255).astype(np.uint8)
    for axis, (plane, _, _) in enumerate(PLANES):
        for split in splits:
            for depth in depths(axis, split):
                pixels = slice_at(volume, image.affine, axis, depth)
                yield recipe.Candidate(
                    name=f"{short}-{plane.split()[-1]}{depth:+04d}-{split}",
                    label=f"{plane} {MAPS[short]}",
                    group=f"{split} slices",
                    source=f"{package.name}: {file}, {plane.split()[-1]} at {depth} mm",
                    licence=package.licence,
                    image=functools.partial(_picture, pixels),
                    split=split,
                )


def _picture(pixels: np.ndarray) -> PIL.Image.Image:
    return recipe.squared(PIL.Image.fromarray(np.ascontiguousarray(pixels)), "black")


RECIPE = recipe.Recipe(
    name="medical",
    families=(
        recipe.Family(
            tuple(f"{plane} {name}" for plane, *_ in PLANES for name in MAPS.values()),
            test=9,
            train=50,
        ),
    ),
    sources=(NILEARN, MRICRON),
    parts=(mni_slices, ch2_slices),
    note="label is the plane and the tissue map of the slice",
)
