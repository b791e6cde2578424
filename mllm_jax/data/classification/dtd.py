"""Describable Textures (Cimpoi et al. 2014): 47 textures, 120 pictures each.

The first of ten official partitions, as in Cross-Modal Projection (Verma et al. 2024): 1,880
pictures per split. That paper leaves the pictures of `val1` out. `load` and `task` also read what
TFDS's own `dtd` has prepared as array_record, if `root` is its data_dir.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from mllm_jax.data.classification import builder
from mllm_jax.data.manual import Need
from mllm_jax.data.sequences import LazySequence

_NAMES = """
banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted
fibrous flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined
marbled matted meshed paisley perforated pitted pleated polka-dotted porous potholed scaly smeared
spiralled sprinkled stained stratified striped studded swirly veined waffled woven wrinkled
zigzagged
"""
LABELS = tuple(_NAMES.split())
CATALOGUE = "3.0.1"  # version of TFDS's own builder


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
        """Yield the rows of a split, in the order of the official list."""
        for name in (folder / "labels" / f"{split}1.txt").read_text().split():
            yield builder.Row(name, name.partition("/")[0], folder / "images" / name)

    @classmethod
    def source(
        cls, root: pathlib.Path, split: str, config: str | None = None
    ) -> Sequence[Mapping] | None:
        """Return the records of a split, also of TFDS's own `dtd`, or None if neither is built."""
        records, folder = super().source(root, split, config), root / cls.name / CATALOGUE
        if records is None and (folder / "dataset_info.json").is_file():
            return _Catalogue(folder, {"val": "validation"}.get(split, split))
        return records


class _Catalogue(LazySequence[Mapping]):
    """The records of TFDS's own `dtd`, in the form of those that are built here."""

    def __init__(self, folder: pathlib.Path, split: str):
        self._source = tfds.builder_from_directory(str(folder)).as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._source)

    def item(self, index: int) -> Mapping:
        """Return the item at an index; see `LazySequence`."""
        record = self._source[index]
        name = record["file_name"]
        label = LABELS.index(name.decode().partition("/")[0])
        return {"id": name, "label": label, "picture": record["image"]}


Builder = Dtd
