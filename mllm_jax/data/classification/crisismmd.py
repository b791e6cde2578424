"""CrisisMMD v2.0 (Alam et al. 2018): pictures of tweets in seven natural disasters.

The splits are the official ones of all tweets, 13,608, 2,237 and 2,237 pictures, and the labels
those of the picture (`label_image`, not of the text). Cross-Modal Projection (Verma et al. 2024)
has 10,461 pictures of the four classes that its Figure 3 shows, and does not state their labels;
the labels with these names are used here, and pictures of the other four are built but belong to
no class of the task.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterator

from mllm_jax.data.classification import builder
from mllm_jax.data.manual import Need

LABELS = (
    "affected_individuals",
    "infrastructure_and_utility_damage",
    "injured_or_dead_people",
    "missing_or_found_people",
    "not_humanitarian",
    "other_relevant_information",
    "rescue_volunteering_or_donation_effort",
    "vehicle_damage",
)
_TABLES = "crisismmd_datasplit_all/task_humanitarian_text_img_{}.tsv"
_NAMES = {"train": "train", "val": "dev", "test": "test"}


class Crisismmd(builder.ClassificationBuilder):
    """Pictures of tweets in disasters, by their humanitarian category."""

    HOMEPAGE = "https://crisisnlp.qcri.org/crisismmd"
    LICENCE = "CC BY-NC-SA 4.0"
    SPLITS = ("train", "val", "test")
    NEEDS = (
        Need("data_image/*/*/*.jpg", "CrisisMMD_v2.0.tar.gz, its folder data_image"),
        *(
            Need(_TABLES.format(name), "crisismmd_datasplit_all.zip, unpacked")
            for name in _NAMES.values()
        ),
    )
    LABELS = LABELS
    CLASSES = builder.plain(
        label for label in LABELS if label.startswith(("affected", "infra", "rescue", "vehicle"))
    )
    TOPIC = "humanitarian categories"

    def rows(self, folder: pathlib.Path, split: str) -> Iterator[builder.Row]:
        """Yield the rows of a split, in the order of the official table."""
        path = folder / _TABLES.format(_NAMES[split])
        with path.open(encoding="utf-8", newline="") as file:
            # Tweets contain unpaired quotation marks.
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield builder.Row(row["image_id"], row["label_image"], folder / row["image"])


Builder = Crisismmd
