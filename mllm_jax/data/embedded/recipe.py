"""Build a domain from candidate images: split by group, balance, drop near-duplicates.

No random numbers are drawn: everything is ordered by hashes of names, so the same packages give the
same data set on every machine.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import PIL.Image

from mllm_jax.data import packages

SIZE = 224
QUALITY = 90
# Two pictures are the same if their thumbnails, one of them also mirrored, correlate this much.
NEAR_COPY = 0.98
THUMBNAIL = 32


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One image that a domain could take.

    Attributes:
      name: A name that is unique in its domain; it becomes the example's id.
      label: What it shows, the answer to the category question.
      group: The name of its group (one object, one block of slices); a group stays in one split.
      source: Its package and its position in it, for the record.
      licence: The image's licence.
      image: A function that makes the picture; called only for the images that are taken.
      split: "train" or "test" if the source determines it, None to split by group.
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
    """Labels that can be confused with one another.

    Attributes:
      labels: The labels.
      test: The number of test images of each.
      train: The number of training images of each.
    """

    labels: tuple[str, ...]
    test: int
    train: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The recipe of one embedded domain.

    Attributes:
      name: The domain's name, such as "objects".
      families: The labels, by family.
      sources: The packages it is built from.
      parts: Functions that find the images, one for each package; each may raise MissingPackage.
      note: One line for the list of licences.
    """

    name: str
    families: tuple[Family, ...]
    sources: tuple[packages.Wheel | packages.Deb, ...]
    parts: tuple[Callable[[], Iterable[Candidate]], ...]
    note: str

    @property
    def size(self) -> int:
        """The number of images of the domain when no label runs short."""
        return sum(len(family.labels) * (family.test + family.train) for family in self.families)

    def family(self, label: str) -> Family:
        """Return the family of a label."""
        return next(family for family in self.families if label in family.labels)


def hashed(text: str) -> bytes:
    """Return the sha256 of a text, the key by which candidates are ordered."""
    return hashlib.sha256(text.encode()).digest()


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


def split_by_group(
    candidates: Iterable[AnyCandidate], quota: Callable[[str], int]
) -> dict[str, list[AnyCandidate]]:
    """Divide candidates into "test" and "train" so that no group is on both sides.

    Groups are taken in the order of their hash; a group goes to the test split while each of its
    labels has room there. Groups with a given split keep it.

    Args:
      candidates: The candidates in any order.
      quota: A function that returns the number of test images of a label.

    Returns:
      Candidates by split, ordered by the hash of their names.
    """
    groups: dict[str, list[AnyCandidate]] = collections.defaultdict(list)
    for candidate in candidates:
        groups[candidate.group].append(candidate)
    taken: collections.Counter[str] = collections.Counter()
    sides: dict[str, list[AnyCandidate]] = {"test": [], "train": []}
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
    return {side: sorted(members, key=lambda c: hashed(c.name)) for side, members in sides.items()}


def thumbnail(image: PIL.Image.Image) -> np.ndarray:
    """Return float32[2, THUMBNAIL**2], a grey thumbnail and its mirror image, of unit length."""
    small = image.convert("L").resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BOX)
    grey = np.asarray(small, np.float32)
    both = np.stack([grey, grey[:, ::-1]]).reshape(2, -1)
    both = both - both.mean(axis=1, keepdims=True)
    # The floor keeps the noise of an almost blank picture from looking like structure.
    return both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), THUMBNAIL)


def likeness(image: np.ndarray, others: np.ndarray) -> float:
    """Return the highest correlation of a thumbnail with others.

    Args:
      image: float32[2, THUMBNAIL**2], the thumbnail and its mirror image.
      others: float32[N, THUMBNAIL**2].
    """
    return float((image @ others.T).max(initial=-1.0))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A candidate that was taken.

    Attributes:
      candidate: The candidate.
      image: Its finished image.
    """

    candidate: Candidate
    image: PIL.Image.Image


def find(recipe: Recipe) -> tuple[list[Candidate], list[str]]:
    """Return all candidates of a domain, and one line for every part whose package is missing.

    Raises:
      MissingPackage: All packages are missing.
    """
    candidates: list[Candidate] = []
    missing: list[str] = []
    for part in recipe.parts:
        try:
            candidates += part()
        except packages.MissingPackage as error:
            missing.append(str(error))
    if not candidates:
        raise packages.MissingPackage("; ".join(missing))
    labels = {label for family in recipe.families for label in family.labels}
    return [candidate for candidate in candidates if candidate.label in labels], missing


def choose(recipe: Recipe, candidates: Sequence[Candidate]) -> Iterator[tuple[str, Picture]]:
    """Yield ("test" or "train", picture), the test split first.

    A training picture that is a near-duplicate of a test picture is dropped, and the next one
    taken.
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
    """Yield the pictures of candidates in order, up to each label's quota; labels alternate."""
    queues: dict[str, list[Candidate]] = collections.defaultdict(list)
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
    """Return the image in the middle of a square of SIZE pixels.

    Args:
      image: The image.
      background: The colour behind transparency and padding.
      margin: The width of the padding on each side, as a fraction of the longer side of the image.
    """
    image = image.convert("RGBA")
    side = round(max(image.size) * (1 + 2 * margin))
    canvas = PIL.Image.new("RGBA", (side, side), background)
    corner = ((side - image.width) // 2, (side - image.height) // 2)
    canvas.alpha_composite(image, corner)
    return canvas.convert("RGB").resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)


def jpeg(image: PIL.Image.Image) -> bytes:
    """Return an image as a JPEG file."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()
