"""Describable Textures (Cimpoi et al. 2014): 47 textures, 120 pictures each.

The first of ten official partitions, as in the projection paper: 1,880 pictures a split. That
paper leaves the pictures of `val1` out.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from mllm_jax.data.classification import builder
from mllm_jax.data.manual import Need

_NAMES = """
banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted
fibrous flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined
marbled matted meshed paisley perforated pitted pleated polka-dotted porous potholed scaly smeared
spiralled sprinkled stained stratified striped studded swirly veined waffled woven wrinkled
zigzagged
"""
LABELS = tuple(_NAMES.split())


class Dtd(builder.ClassificationBuilder):
    """Textures in the wild, by what people call them."""

    HOMEPAGE = "https://www.robots.ox.ac.uk/~vgg/data/dtd/"
    LICENCE = "for research; see the homepage"
    SPLITS = ("train", "val", "test")
    NEEDS = (
        Need("images/*/*.jpg", "dtd-r1.0.1.tar.gz, unpacked so that images/ and labels/ lie here"),
        *(Need(f"labels/{split}1.txt", "of the same archive") for split in SPLITS),
    )
    LABELS = LABELS
    CLASSES = builder.plain(LABELS)
    TOPIC = "visual textures"

    def rows(self, folder: pathlib.Path, split: str) -> Iterator[builder.Row]:
        for name in (folder / "labels" / f"{split}1.txt").read_text().split():
            yield builder.Row(name, name.partition("/")[0], folder / "images" / name)


Builder = Dtd
