"""The base of the four builders: a record is a picture and its class."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mllm_jax.data import domains, manual


@dataclasses.dataclass(frozen=True)
class Row:
    """One picture, which is not read yet.

    Attributes:
      id: The name of the picture in its data set.
      label: One of the data set's LABELS.
      file: The picture's file.
    """

    id: str
    label: str
    file: pathlib.Path


class ClassificationBuilder(manual.ManualBuilder, skip_registration=True):
    """Pictures of one class each.

    A subclass defines the files it needs, and the rows of a split if they are not in folders.

    Attributes:
      LABELS: The labels of the data set; a label's index is its id.
      CLASSES: The classes of the paper (Verma et al. 2024), {class in prompts: label}.
      TOPIC: A description of the classes, for the prompt.
    """

    LABELS: ClassVar[tuple[str, ...]] = ()
    CLASSES: ClassVar[dict[str, str]] = {}
    TOPIC = ""

    def rows(self, folder: pathlib.Path, split: str) -> Iterator[Row]:
        """Yield the rows of a split, in order; by default `folder/<split>/<label>/<picture>`."""
        for file in sorted((folder / split).glob("*/*")):
            if file.suffix.lower() in domains.IMAGE_EXTENSIONS and not file.name.startswith("."):
                yield Row(file.relative_to(folder).as_posix(), file.parent.name, file)

    def record(self) -> dict[str, Any]:
        """Return the TFDS features of a record: id, label and the encoded picture."""
        text = tfds.features.Text()
        label = tfds.features.ClassLabel(names=list(self.LABELS))
        return {"id": text, "label": label, "picture": text}  # the picture as it is encoded

    def examples(self, folder: pathlib.Path, split: str) -> Iterator[dict]:
        """Yield the records of a split, in order."""
        for row in self.rows(folder, split):
            if row.label not in self.LABELS:
                raise ValueError(
                    f"{self.name}: {row.id} in {folder} has the label {row.label!r}, which is not "
                    f"one of the {len(self.LABELS)} labels of the data set"
                )
            picture = manual.encoded(self.name, row.file)
            yield {"id": row.id, "label": row.label, "picture": picture}


def plain(labels: Iterable[str]) -> dict[str, str]:
    """Return {class: label}, where a class is its label with spaces for underscores."""
    return {label.replace("_", " "): label for label in labels}
