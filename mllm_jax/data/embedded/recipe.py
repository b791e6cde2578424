"""How a domain is made out of candidate images: split by group, balance, and drop near copies.

Nothing here draws a random number: every order is the order of hashes of names, so the same
packages give the same data set on every machine.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import PIL.Image

from mllm_jax.data import packages

SIZE = 224
QUALITY = 90
# From this correlation of two thumbnails on, one of them also mirrored, it is the same picture.
NEAR_COPY = 0.98
THUMBNAIL = 32


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One image that a domain could take.

    Attributes:
      name: unique in its domain; the example's id is made of it.
      label: what it shows, the answer to the category question.
      group: images of one group (one object, one block of slices) never part between the splits.
      source: package and place in it, for the record.
      licence: of this image.
      image: makes the picture; called only for the images that are taken.
      split: "train" or "test" where the source decides, None to split by group.
    """

    name: str
    label: str
    group: str
    source: str
    licence: str
    image: Callable[[], PIL.Image.Image]
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """Labels that can be confused with one another, and how many images of each are taken."""

    labels: tuple[str, ...]
    test: int
    train: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One embedded domain.

    Attributes:
      name: "objects".
      families: the labels, by family.
      sources: the packages it is built from.
      parts: functions that find the images, one by package; each may raise MissingPackage.
      note: one line for the list of licences.
    """

    name: str
    families: tuple[Family, ...]
    sources: tuple[packages.Wheel | packages.Deb, ...]
    parts: tuple[Callable[[], Iterable[Candidate]], ...]
    note: str

    @property
    def size(self) -> int:
        """How many images it has when no label runs short."""
        return sum(len(family.labels) * (family.test + family.train) for family in self.families)

    def family(self, label: str) -> Family:
        return next(family for family in self.families if label in family.labels)


def hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split_by_group(
    candidates: Iterable[Candidate], quota: Callable[[str], int]
) -> dict[str, list[Candidate]]:
    """Divides candidates into "test" and "train" so that no group is on both sides.

    Groups come in the order of their hash; a group goes to the test split while each of its labels
    has room there. Groups whose source decided stay where they are.

    Args:
      candidates: in any order.
      quota: test images wanted of a label.

    Returns:
      Candidates by split, ordered by the hash of their names.
    """
    groups = collections.defaultdict(list)
    for candidate in candidates:
        groups[candidate.group].append(candidate)
    taken = collections.Counter()
    sides = {"test": [], "train": []}
    for group in sorted(groups, key=hashed):
        members = groups[group]
        decided = {member.split for member in members}
        if len(decided) > 1:
            raise ValueError(f"group {group!r} is given to several splits: {decided}")
        side = decided.pop()
        if side is None:
            counts = collections.Counter(member.label for member in members)
            fits = all(taken[label] + count <= quota(label) for label, count in counts.items())
            side = "test" if fits else "train"
            if fits:
                taken.update(counts)
        sides[side] += members
    return {side: sorted(found, key=lambda c: hashed(c.name)) for side, found in sides.items()}


def thumbnail(image: PIL.Image.Image) -> np.ndarray:
    """float32[2, THUMBNAIL**2]: grey thumbnail and its mirror image, centred, of unit length."""
    small = image.convert("L").resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BOX)
    grey = np.asarray(small, np.float32)
    both = np.stack([grey, grey[:, ::-1]]).reshape(2, -1)
    both = both - both.mean(axis=1, keepdims=True)
    # The floor keeps the noise of an almost blank picture from looking like structure.
    return both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), THUMBNAIL)


def likeness(image: np.ndarray, others: np.ndarray) -> float:
    """Highest correlation of one thumbnail, mirrored or not, with others [N, THUMBNAIL**2]."""
    return float((image @ others.T).max(initial=-1.0))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A candidate that was taken, with its finished image."""

    candidate: Candidate
    image: PIL.Image.Image


def find(recipe: Recipe) -> tuple[list[Candidate], list[str]]:
    """All candidates of a domain, and one line for every part whose package is missing.

    Raises:
      MissingPackage: when nothing is left.
    """
    found, missing = [], []
    for part in recipe.parts:
        try:
            found += part()
        except packages.MissingPackage as error:
            missing.append(str(error))
    if not found:
        raise packages.MissingPackage("; ".join(missing))
    labels = {label for family in recipe.families for label in family.labels}
    return [candidate for candidate in found if candidate.label in labels], missing


def choose(recipe: Recipe, candidates: Sequence[Candidate]) -> Iterator[tuple[str, Picture]]:
    """Yields ("test" or "train", picture), the test split first.

    A training picture that is a near copy of a test picture is dropped, and the next one taken.
    """
    sides = split_by_group(candidates, lambda label: recipe.family(label).test)
    seen = []
    for picture in _fill(sides["test"], lambda label: recipe.family(label).test):
        seen.append(thumbnail(picture.image)[0])
        yield "test", picture

    def is_new(image: PIL.Image.Image) -> bool:
        return likeness(thumbnail(image), np.stack(seen)) < NEAR_COPY

    for picture in _fill(sides["train"], lambda label: recipe.family(label).train, is_new):
        yield "train", picture


def _fill(
    candidates: Sequence[Candidate],
    quota: Callable[[str], int],
    accept: Callable[[PIL.Image.Image], bool] = lambda image: True,
) -> Iterator[Picture]:
    """Takes candidates in order, up to the quota of each label; labels alternate."""
    queues = collections.defaultdict(list)
    for candidate in reversed(candidates):
        queues[candidate.label].append(candidate)
    left = {label: quota(label) for label in sorted(queues, key=hashed)}
    while left:
        for label in list(left):
            if not (left[label] and queues[label]):
                del left[label]
                continue
            candidate = queues[label].pop()
            image = candidate.image()
            if accept(image):
                left[label] -= 1
                yield Picture(candidate, image)


def squared(
    image: PIL.Image.Image, background: str = "white", margin: float = 0.0
) -> PIL.Image.Image:
    """The image on a square of SIZE pixels: transparency and padding take the background."""
    image = image.convert("RGBA")
    side = round(max(image.size) * (1 + 2 * margin))
    canvas = PIL.Image.new("RGBA", (side, side), background)
    corner = ((side - image.width) // 2, (side - image.height) // 2)
    canvas.alpha_composite(image, corner)
    return canvas.convert("RGB").resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)


def jpeg(image: PIL.Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()
