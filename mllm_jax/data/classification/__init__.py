"""The four data sets of the projection study (Verma et al. 2024): TFDS builders and tasks.

    classification.build("plantdoc", manual="/data/tasks")   # from /data/tasks/plantdoc, once
    task = classification.task("plantdoc")                   # a Task, like those of embedded data
    print(classification.instructions("plantdoc"))           # what to download, and to which folder

No TensorFlow is needed. `tfds.builder_from_directory` also reads the built data sets.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

from mllm_jax import store
from mllm_jax.data import domains, tasks
from mllm_jax.data.sequences import LazySequence

NAMES = ("plantdoc", "dtd", "dermnet", "crisismmd")  # in the paper's order
Spelling = Literal["corrected", "official"]
SPELLINGS: tuple[Spelling, ...] = ("corrected", "official")


def instructions(name: str) -> str:
    """Return what to download for a data set, and to which folder."""
    return _builder(name).MANUAL_DOWNLOAD_INSTRUCTIONS


def build(
    name: str, manual: str | os.PathLike, root: str | os.PathLike | None = None
) -> pathlib.Path:
    """Build a data set into array_record files, unless it exists.

    Args:
      name: One of NAMES.
      manual: The folder that holds `<name>/` with the files as they were downloaded.
      root: The folder where data sets are kept; the user's cache by default.

    Returns:
      The folder of the built data set.

    Raises:
      FileNotFoundError: Files are missing; the message lists them and their sources.
    """
    return _builder(name).build(manual, _root(root))


def load(name: str, split: str, *, root: str | os.PathLike | None = None) -> domains.Domain:
    """Return a split of a built data set; pictures are read when they are needed.

    Args:
      name: One of NAMES.
      split: "train", "test", and "val" of dtd and crisismmd.
      root: Where data sets are kept; the user's cache by default.

    Returns:
      The domain. The labels are those of the data set; its examples have no questions.

    Raises:
      FileNotFoundError: It is not built; the message states how to build it.
    """
    kind, root = _builder(name), _root(root)
    source = kind.source(root, domains.require_known("split", split, kind.SPLITS))
    if source is None:
        raise FileNotFoundError(
            f"{name} is not built in {root}: run "
            f"mllm_jax.data.classification.build({name!r}, manual=FOLDER). {instructions(name)}"
        )
    return domains.Domain(name, split, _Records(name, split, source, kind.LABELS, kind.LICENCE))


def task(
    name: str,
    *,
    spelling: Spelling = "corrected",
    held: float = 0.1,
    near_copy: float | None = None,
    seed: int = 0,
    root: str | os.PathLike | None = None,
) -> tasks.Task:
    """Return a built data set as a task with the paper's classes and splits.

    Args:
      name: One of NAMES.
      spelling: The spelling of the classes. "official" removes the underscores of labels, as the
        released code does ("Bellpepper leaf"); "corrected" replaces them by spaces.
      held: The share of each class of train that is held out, for a data set without "val".
      near_copy: The correlation from which two pictures are near-duplicates, such as 0.98:
        near-duplicates of test and held-out pictures are removed from train. None compares nothing
        and keeps the splits unchanged.
      seed: The seed of the choice of held-out pictures.
      root: The folder where data sets are kept; the user's cache by default.
    """
    kind = _builder(name)
    classes = kind.CLASSES
    if domains.require_known("spelling", spelling, SPELLINGS) == "official":
        classes = {label.replace("_", ""): label for label in classes.values()}
    return tasks.Task.from_domain(
        load(name, "train", root=root),
        load(name, "test", root=root),
        load(name, "val", root=root) if "val" in kind.SPLITS else held,
        classes=classes,
        topic=kind.TOPIC,
        ratio=float("inf"),
        near_copy=near_copy,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class _Records(LazySequence[domains.Example]):
    """Examples of a TFDS data source."""

    name: str
    split: str
    source: Sequence[Mapping]
    labels: tuple[str, ...]
    licence: str

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int) -> domains.Example:
        """Return the item at an index; see `LazySequence`."""
        record = self.source[index]
        return domains.Example(
            id=f"{self.split} {record['id'].decode()}",
            domain=self.name,
            label=self.labels[int(record["label"])],
            encoded=record["picture"],
            questions=(),
            source=record["id"].decode(),
            licence=self.licence,
        )


def _builder(name: str):
    domains.require_known("data set", name, NAMES)
    return importlib.import_module(f"mllm_jax.data.classification.{name}").Builder


def _root(root: str | os.PathLike | None) -> pathlib.Path:
    return store.cache_directory() / "classification" if root is None else pathlib.Path(root)
