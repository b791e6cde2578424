"""Classification tasks: pictures of one class each, split without near-duplicates.

    found = tasks.embedded(seed=0)     # {"objects": Task, "astronomy": Task, ...}
    mine = tasks.Task.from_domain(domains.Domain.from_folder("birds"))    # birds/<class>/*.jpg

The test pictures of the embedded tasks are the test pictures of the embedded domains, on which the
projector of the embedded model was not trained. It was trained on those of train and held (the
held-out split), which is for early stopping and selection, never for reporting.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import PIL.Image

from mllm_jax.data import batching, domains
from mllm_jax.data.embedded import objects, recipe
from mllm_jax.data.sequences import LazySequence

Split = Literal["train", "held", "test"]
SPLITS: tuple[Split, ...] = ("train", "held", "test")
TEST = 0.25  # share of each class, if a domain has no test pictures
HELD = 0.2  # share of each class among the pictures that are not for testing
RATIO = 2.0  # largest ratio of the training pictures of a class to those of the smallest class

# Classes in the order of their ids, and their labels in the domain. "land in Australia" is left
# out: it has only 12 training pictures.
EMBEDDED = {
    "objects": (
        "kinds of objects",
        {
            "animal": "an animal",
            "fruit or vegetable": "a fruit or vegetable",
            "plant": "a plant",
            "clothing": "a piece of clothing",
            "vehicle": "a vehicle",
            "person": "a person",
            "chair or sofa": "a chair or sofa",
            "table": "a table",
            "cabinet": "a cabinet",
            "lamp": "a lamp",
            "door or window": "a door or window",
            "tableware": "tableware",
        },
    ),
    "astronomy": (
        "objects of the night sky",
        {
            "spiral galaxy": "a spiral galaxy",
            "globular cluster": "a globular cluster",
            "open cluster": "an open cluster",
            "planetary nebula": "a planetary nebula",
            "diffuse nebula": "a diffuse nebula",
        },
    ),
    "satellite": (
        "regions of the Earth",
        {
            "Africa": "land in Africa",
            "Asia": "land in Asia",
            "Europe": "land in Europe",
            "North America": "land in North America",
            "South America": "land in South America",
            "Antarctica": "ice in Antarctica",
            "sea coast": "a sea coast",
            "open ocean": "open ocean",
        },
    ),
    "documents": (
        "kinds of pages",
        {
            "sheet music": "sheet music",
            "text": "a page of text",
            "program listing": "a program listing",
            "list of contents": "a list of contents",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One classification task.

    Attributes:
      name: The task's name, such as "astronomy".
      topic: A description of the classes, for the prompt: "objects of the night sky".
      classes: The names of the classes; a class's index is its id. The label of an example is its
        class.
      train: The examples for fitting.
      held: The examples for early stopping.
      test: The examples for reporting.
    """

    name: str
    topic: str
    classes: tuple[str, ...]
    train: Sequence[domains.Example]
    held: Sequence[domains.Example]
    test: Sequence[domains.Example]

    def ids(self, split: str) -> np.ndarray:
        """Return int32[N], the class ids of a split's examples."""
        ids = {name: number for number, name in enumerate(self.classes)}
        return np.array([ids[example.label] for example in self[split]], np.int32)

    def counts(self, split: str) -> np.ndarray:
        """Return int64[C], the number of examples of each class in a split."""
        return np.bincount(self.ids(split), minlength=len(self.classes))

    def __getitem__(self, split: str) -> Sequence[domains.Example]:
        """Return the examples of a split."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; a task has {', '.join(SPLITS)}")
        return getattr(self, split)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of the classes and of all pictures in their order, for manifests."""
        digest = hashlib.sha256(repr((self.name, self.topic, self.classes)).encode())
        for split in SPLITS:
            for example in self[split]:
                digest.update(f"{split} {example.id} {example.label}\n".encode())
                digest.update(hashlib.sha256(example.encoded).digest())
        return digest.hexdigest()

    @classmethod
    def from_domain(
        cls,
        domain: domains.Domain,
        test: domains.Domain | float = TEST,
        held: domains.Domain | float = HELD,
        *,
        classes: Sequence[str] | Mapping[str, str] | None = None,
        topic: str | None = None,
        name: str | None = None,
        group: Callable[[domains.Example], str] | None = None,
        ratio: float = RATIO,
        near_copy: float | None = recipe.NEAR_COPY,
        seed: int = 0,
    ) -> Task:
        """Return a task whose classes are labels of a domain.

        Near-duplicates, by the rule of the embedded domains (`recipe.NEAR_COPY`), are never in two
        splits: near-duplicates of a given split are left out, others stay in one split, as do the
        pictures of one group. Classes alternate in each split: any prefix is balanced.

        Args:
          domain: The domain to divide.
          test: The test pictures, in an order that no seed changes; or their share of each class
            of `domain`.
          held: The held-out pictures; or their share of the pictures that are not for testing.
          classes: Labels in the order of their ids, or {class: label}; examples with other
            labels are left out. All labels in alphabetic order by default.
          topic: A description of the classes; the name by default.
          name: The task's name; the domain's by default.
          group: A function that returns the same string for pictures that belong together, such as
            views of one object.
          ratio: The largest ratio of the pictures of a class to those of the smallest class, in
            each split that is made here.
          near_copy: The correlation from which two pictures are near-duplicates; None compares no
            pictures.
          seed: The seed of the division.

        Raises:
          ValueError: There are fewer than two classes, or a class has no picture in a split that
            is made here.
        """
        name = name or domain.name
        named = _named(name, domain, classes)
        parts = {
            split: _read(pictures, named, group, seed=0)
            for split, pictures in (("test", test), ("held", held))
            if isinstance(pictures, domains.Domain)
        }
        given = set(parts)
        rest = _read(domain, named, group, seed)
        if near_copy is not None:
            rest = _apart(rest, [picture for part in parts.values() for picture in part], near_copy)
        for split, share in (("test", test), ("held", held)):
            if not isinstance(share, domains.Domain):
                parts[split], rest = _divide(rest, share, ratio)
        parts["train"] = _first(rest, _limits(rest, ratio))
        for split in SPLITS:
            lacking = set(named) - {picture.label for picture in parts[split]}
            if lacking and split not in given:
                raise ValueError(
                    f"task {name!r}: class {min(lacking)!r} has no picture for {split}; add "
                    "pictures, or leave it out of classes="
                )
        splits = {
            split: domains.Domain(name, split, _Alternating(parts[split], tuple(named)))
            for split in SPLITS
        }
        return cls(name, topic or name, tuple(named), **splits)


def embedded(seed: int = 0, root: str | os.PathLike | None = None) -> dict[str, Task]:
    """Return the four tasks on the embedded domains by name.

    Args:
      seed: The seed of the division into train and held; test is always the same.
      root: The folder where the domains are kept; the user's cache by default.

    Raises:
      MissingPackage: A domain cannot be built.
    """
    train = domains.embedded("train", tuple(EMBEDDED), root)
    test = domains.embedded("test", tuple(EMBEDDED), root)
    return {
        name: Task.from_domain(
            train[name],
            test[name],
            classes=classes,
            topic=topic,
            seed=seed,
            group=_variants if name == "objects" else None,
        )
        for name, (topic, classes) in EMBEDDED.items()
    }


def _variants(example: domains.Example) -> str:
    """Return a picture's class, and its file's name without the numbers of variants."""
    return f"{example.label} {objects.stem(example.id.rsplit('-', 1)[-1])}"


@dataclasses.dataclass(frozen=True)
class _Picture(recipe.Candidate):
    """A candidate that is an example of a domain."""

    domain: domains.Domain | None = None
    index: int = -1


def _named(
    name: str, domain: domains.Domain, classes: Sequence[str] | Mapping[str, str] | None
) -> dict[str, str]:
    """Return {class: label}."""
    if classes is None:
        classes = sorted({example.label for example in domain})
    if isinstance(classes, str) or len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"task {name!r} needs two classes or more, no two alike, not {classes!r}")
    return dict(classes) if isinstance(classes, Mapping) else {label: label for label in classes}


def _read(
    domain: domains.Domain,
    named: dict[str, str],
    group: Callable[[domains.Example], str] | None,
    seed: int,
) -> list[_Picture]:
    """Return the examples of the classes, in the order of the seed."""
    class_of = {label: name for name, label in named.items()}
    pictures = []
    for index, example in enumerate(domain):
        if example.label in class_of:
            pictures.append(
                _Picture(
                    name=f"{seed} {example.id}",
                    label=class_of[example.label],
                    group=f"{seed} {group(example) if group else example.id}",
                    source=example.source,
                    licence=example.licence,
                    image=functools.partial(_image, domain, index),
                    domain=domain,
                    index=index,
                )
            )
    return sorted(pictures, key=lambda picture: recipe.hashed(picture.name))


def _image(domain: domains.Domain, index: int) -> PIL.Image.Image:
    return domain[index].image


def _thumbnails(pictures: Sequence[_Picture]) -> np.ndarray:
    """Return float32[N, 2, pixels], see `recipe.thumbnail`."""
    thumbnails = [recipe.thumbnail(picture.image()) for picture in pictures]
    return np.stack(thumbnails) if thumbnails else np.zeros((0, 2, recipe.THUMBNAIL**2), np.float32)


def _apart(
    pictures: Sequence[_Picture], seen: Sequence[_Picture], near_copy: float
) -> list[_Picture]:
    """Return the pictures that are not near-duplicates of those seen, duplicates in one group."""
    thumbnails = _thumbnails(pictures)
    if seen:
        others = _thumbnails(seen)[:, 0]
        new = [recipe.likeness(shown, others) < near_copy for shown in thumbnails]
        thumbnails = thumbnails[new]
        pictures = [picture for picture, is_new in zip(pictures, new, strict=True) if is_new]
    parent = list(range(len(pictures)))

    def first(at: int) -> int:
        while parent[at] != at:
            parent[at] = at = parent[parent[at]]
        return at

    start: dict[str, int] = {}
    for at, picture in enumerate(pictures):
        like = np.flatnonzero((thumbnails[at] @ thumbnails[:at, 0].T).max(0) >= near_copy)
        for other in (start.setdefault(picture.group, at), *like):
            low, high = sorted((first(at), first(int(other))))
            parent[high] = low
    return [
        dataclasses.replace(picture, group=pictures[first(at)].name)
        for at, picture in enumerate(pictures)
    ]


def _limits(pictures: Iterable[_Picture], ratio: float) -> dict[str, int]:
    """Return the largest number of pictures of each class."""
    counts = collections.Counter(picture.label for picture in pictures)
    most = ratio * min(counts.values(), default=0)
    return {label: int(min(count, most)) for label, count in counts.items()}


def _divide(
    pictures: Sequence[_Picture], share: float, ratio: float
) -> tuple[list[_Picture], list[_Picture]]:
    """Return a share of each class, and the rest; no group is on both sides."""
    limits = _limits(pictures, ratio)
    sides = recipe.split_by_group(pictures, lambda label: max(1, round(share * limits[label])))
    return sides["test"], sides["train"]


def _first(pictures: Iterable[_Picture], limits: dict[str, int]) -> list[_Picture]:
    """Return the first pictures of each class, up to its limit."""
    left = collections.Counter(limits)
    selected = []
    for picture in pictures:
        left[picture.label] -= 1
        if left[picture.label] >= 0:
            selected.append(picture)
    return selected


class _Alternating(LazySequence[domains.Example]):
    """The examples of pictures, with classes as labels; classes alternate."""

    def __init__(self, pictures: Sequence[_Picture], classes: tuple[str, ...]):
        by_class = [[p for p in pictures if p.label == name] for name in classes]
        self._pictures = batching.interleave(by_class)

    def __len__(self) -> int:
        return len(self._pictures)

    def item(self, index: int) -> domains.Example:
        """Return the item at an index; see `LazySequence`."""
        picture = self._pictures[index]
        assert picture.domain is not None
        return dataclasses.replace(picture.domain[picture.index], label=picture.label)
