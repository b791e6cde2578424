"""Rows of a batch before padding, and the arithmetic that lays them out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_jax import tokens
from mllm_jax.batch import Layout

# Rows are padded to one of these lengths, so that batches share a few compiled programs.
LENGTHS = (
    32, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 2560, 3072, 4096,
)  # fmt: skip
LONGER = 1024  # beyond those, to a multiple of this
IMAGE_KINDS = (tokens.CODE["image"], tokens.CODE["newline"])


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a row.

    Attributes:
      image: in RGB, or None where features stand for it.
      layout: how the model reads it.
    """

    image: Any
    layout: Layout


@dataclasses.dataclass
class Row:
    """One tokenised row, before padding."""

    ids: list[int] = dataclasses.field(default_factory=list)
    kinds: list[int] = dataclasses.field(default_factory=list)
    patches: list[int] = dataclasses.field(default_factory=list)  # through all its tiles, or -1
    positions: list[int] = dataclasses.field(default_factory=list)
    segments: list[int] = dataclasses.field(default_factory=list)
    prompt: int = 0  # tokens of the prompt, or of the first of several
    qformer_rows: list[Row] = dataclasses.field(
        default_factory=list
    )  # for each image, a Q-Former's text

    def add(
        self, ids: Sequence[int], kinds: Sequence[int], patches=None, *, segment: int = 0, at=None
    ) -> None:
        """Appends tokens; `at` is the position of the first, if it is not the next."""
        start = len(self.ids) if at is None else at
        self.ids.extend(ids)
        self.kinds.extend(kinds)
        self.patches.extend([-1] * len(ids) if patches is None else patches)
        self.positions.extend(range(start, start + len(ids)))
        self.segments.extend([segment] * len(ids))


def assign_image_slots(pictures: list[list[Picture]], rows: list[Row]) -> tuple[list[int], int]:
    """Where each row's pictures stand among all, and how many places there are.

    Rows that read the same pictures, and are told the same of them, share a place; then the places
    are a power of two: few shapes. Where these are not fewer than the rows, each has its own.
    """

    def key(shown: list[Picture], row: Row) -> tuple:
        images = tuple(id(p.image) for p in shown if p.image is not None)
        return images and (images, tuple(tuple(told.ids) for told in row.qformer_rows))

    keys = [key(*pair) for pair in zip(pictures, rows, strict=True)]
    distinct = list(dict.fromkeys(filter(None, keys)))
    count = 2 ** max(0, len(distinct) - 1).bit_length()
    if len(distinct) == sum(map(bool, keys)) or count >= len(keys):
        return list(range(len(keys))), len(keys)
    return [distinct.index(key) if key else 0 for key in keys], count


def round_up_length(length: int) -> int:
    """The nearest of LENGTHS."""
    return next((n for n in LENGTHS if n >= length), -(-length // LONGER) * LONGER)


def place_features(features: np.ndarray, pictures: list[list[Picture]], count: int) -> np.ndarray:
    """Features of one picture a row at each place [B, count] where it is read, zero elsewhere."""
    out = np.zeros((len(pictures), count, *features.shape[1:]), features.dtype)
    for places, row, values in zip(out, pictures, features, strict=False):
        places[: len(row)] = values
    return out


def answer_positions(kind: np.ndarray) -> np.ndarray | None:
    """int32[B, A]: the places of the answer tokens, -1 to fill up; A is a multiple of 8."""
    answer = kind == tokens.CODE["answer"]
    most = answer.sum(-1).max()
    if not most:
        return None
    labels = np.full((len(kind), -(-most // 8) * 8), -1, np.int32)
    for row, found in zip(labels, answer, strict=True):
        places = np.flatnonzero(found)
        row[: len(places)] = places
    return labels
