"""Rows of a batch before padding, and their conversion to arrays."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from mllm_jax import tokens
from mllm_jax.batch import Interpolation, Layout

# Rows are padded to one of these lengths, so that batches share a few compiled programs.
LENGTHS = (
    32, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 2560, 3072, 4096,
)  # fmt: skip
LENGTH_MULTIPLE = 1024  # longer rows are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a row.

    Attributes:
      image: The picture in RGB, or None if features replace it.
      layout: Its layout in the model.
    """

    image: PIL.Image.Image | None
    layout: Layout


class Token(NamedTuple):
    """One token of a row.

    Attributes:
      id: Its id.
      kind: Its kind, a code of `tokens.CODE`.
      tile: The tile of an image token, counted through the pictures of the row; -1 for text.
      patch: The number of the token in that tile, in the order of the tower; -1 for text and
        newlines.
      row: The row of an image token on the grid of its tile, -1 elsewhere.
      column: The column on that grid, -1 elsewhere.
      sources: The tokens, among those of all tiles of the row, of which an interpolated image token
        is a weighted sum; empty for other tokens.
      weights: The weights of `sources`.
    """

    id: int
    kind: int
    tile: int = -1
    patch: int = -1
    row: int = -1
    column: int = -1
    sources: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def is_image(self) -> bool:
        """Whether it is an image token or a newline between image tokens."""
        return self.kind in (tokens.CODE["image"], tokens.CODE["newline"])


@dataclasses.dataclass
class Row:
    """One tokenised row, before padding.

    Attributes:
      tokens: The tokens.
      positions: The position of each token.
      segments: The packed question that each token belongs to, from 1 on, or 0.
      ends: The last token of the prompt, or of each packed question.
      qformer_rows: For each image, the text that a Q-Former reads with it.
    """

    tokens: list[Token] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    segments: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)
    qformer_rows: list[Row] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, added: Iterable[Token], *, segment: int = 0, start: int | None = None) -> None:
        """Append tokens.

        Args:
          added: The tokens.
          segment: The packed question that they belong to.
          start: The position of the first, if it is not the next.
        """
        added = list(added)
        start = len(self) if start is None else start
        self.tokens.extend(added)
        self.positions.extend(range(start, start + len(added)))
        self.segments.extend([segment] * len(added))

    def column(self, name: str) -> np.ndarray:
        """Return one field of each token, int[n]."""
        return np.array([getattr(token, name) for token in self.tokens], int)

    @property
    def ids(self) -> list[int]:
        """The id of each token."""
        return [token.id for token in self.tokens]


def same_at_start(sequences: Iterable[Iterable[Any]]) -> int:
    """Return the number of entries that all sequences share at their start."""
    at_each = zip(*sequences, strict=False)  # up to the shortest
    return sum(1 for _ in itertools.takewhile(lambda found: len(set(found)) == 1, at_each))


def text_tokens(ids: Iterable[int], kinds: Iterable[int]) -> list[Token]:
    """Return tokens of text."""
    return [Token(*pair) for pair in zip(ids, kinds, strict=True)]


def image_tokens(
    layout: Layout, image_token: int, first_tile: int, tile_tokens: int, grid: int
) -> list[Token]:
    """Return the image tokens of one picture.

    Args:
      layout: The layout of the picture.
      image_token: The id of an image token.
      first_tile: The number of its first tile in the row.
      tile_tokens: The number of tokens of a tile.
      grid: The side of the square at the end of a tile's tokens, for layouts without places.
    """
    made = []
    for number, patch in enumerate(layout.patches.tolist()):
        if patch < 0:
            made.append(Token(image_token, tokens.CODE["newline"]))
            continue
        tile, at = divmod(patch, tile_tokens)
        if layout.places is not None:
            place = layout.places[number].tolist()
        else:  # tokens that are not patches, such as CLS, come first in a tile
            on_grid = at - (tile_tokens - grid**2)
            place = divmod(on_grid, grid) if on_grid >= 0 and grid else (-1, -1)
        made.append(Token(image_token, tokens.CODE["image"], first_tile + tile, at, *place))
    if layout.interpolation is None:
        return made
    sources, weights = layout.interpolation
    sources = sources + first_tile * tile_tokens
    return [
        token if token.patch < 0 else token._replace(sources=tuple(index), weights=tuple(weight))
        for token, index, weight in zip(made, sources.tolist(), weights.tolist(), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class ImageSlots:
    """The positions of the image tokens of a batch among those of all its pictures.

    Rows with the same pictures share a slot.

    Attributes:
      of_row: The slot of each row's pictures.
      count: The number of slots.
      tiles: The number of tiles of a slot.
      tile_tokens: The number of image tokens of a tile.
    """

    of_row: list[int]
    count: int
    tiles: int
    tile_tokens: int


def assign_image_slots(pictures: list[list[Picture]], rows: list[Row]) -> tuple[list[int], int]:
    """Return the image slot of each row, and the number of slots.

    Rows with the same pictures, and the same text for a Q-Former, share a slot; the number of slots
    is then a power of two, for few shapes. If that would not save a slot, each row has its own.
    """

    def key(row_pictures: list[Picture], row: Row) -> tuple:
        images = tuple(id(p.image) for p in row_pictures if p.image is not None)
        return images and (images, tuple(tuple(text.ids) for text in row.qformer_rows))

    keys = [key(*pair) for pair in zip(pictures, rows, strict=True)]
    distinct = list(dict.fromkeys(filter(None, keys)))
    count = 2 ** max(0, len(distinct) - 1).bit_length()
    if len(distinct) == sum(map(bool, keys)) or count >= len(keys):
        return list(range(len(keys))), len(keys)
    return [distinct.index(key) if key else 0 for key in keys], count


def round_up_length(length: int) -> int:
    """Return the smallest padded length that holds this many tokens."""
    rounded = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return next((n for n in LENGTHS if n >= length), rounded)


def token_arrays(
    rows: list[Row], length: int, slots: ImageSlots, *, padding_id: int, left: bool
) -> dict[str, Any]:
    """Return the fields of a batch that have one value for each token.

    Args:
      rows: The rows; a row without tokens is only padding.
      length: The number of tokens T of a padded row.
      slots: The positions of the image tokens of each row.
      padding_id: The id of padding.
      left: Whether to pad on the left.

    Returns:
      `ids`, `position`, `image_token_index` int32[B, T], `segment` int32[B, T] or None,
      `interpolation` or None, and `tokens`.
    """
    shape = len(rows), length
    ids = np.full(shape, padding_id, np.int32)
    position, segment = np.zeros((2, *shape), np.int32)
    kind = np.zeros(shape, np.int8)
    image_token_index = np.full(shape, -1, np.int32)
    places = {name: np.full(shape, -1, np.int16) for name in ("row", "column", "tile")}
    last = np.zeros(shape, bool)
    newline = slots.count * slots.tiles * slots.tile_tokens
    for b, row in enumerate(rows):
        if not row.tokens:
            continue
        at = token_columns(row, length, left)
        ids[b, at], kind[b, at] = row.column("id"), row.column("kind")
        position[b, at], segment[b, at] = row.positions, row.segments
        last[b, at[row.ends]] = True
        for name, array in places.items():
            array[b, at] = row.column(name)
        tile, patch = row.column("tile"), row.column("patch")
        index = (slots.of_row[b] * slots.tiles + tile) * slots.tile_tokens + patch
        is_newline = row.column("kind") == tokens.CODE["newline"]
        image_token_index[b, at] = np.where(is_newline, newline, np.where(patch < 0, -1, index))
    return {
        "ids": ids,
        "position": position,
        "tokens": tokens.TokenMap(
            kind=kind, last=last, row=places["row"], column=places["column"], tile=places["tile"]
        ),
        "image_token_index": image_token_index,
        "segment": segment if segment.any() else None,
        "interpolation": _interpolation(rows, image_token_index, slots, left),
    }


def _interpolation(
    rows: list[Row], image_token_index: np.ndarray, slots: ImageSlots, left: bool
) -> Interpolation | None:
    """Return the interpolation of image tokens; None if no token is interpolated."""
    if not any(token.sources for row in rows for token in row.tokens):
        return None
    index = np.repeat(image_token_index[..., None], 4, -1)  # the others are their own sum
    weight = np.zeros(index.shape, np.float32)
    weight[..., 0] = 1
    for b, row in enumerate(rows):
        first = slots.of_row[b] * slots.tiles * slots.tile_tokens
        at = token_columns(row, image_token_index.shape[1], left)
        mixed = [n for n, token in enumerate(row.tokens) if token.sources]
        if mixed:
            index[b, at[mixed]] = first + np.array([row.tokens[n].sources for n in mixed])
            weight[b, at[mixed]] = [row.tokens[n].weights for n in mixed]
    return Interpolation(index, weight)


def token_columns(row: Row, length: int, left: bool) -> np.ndarray:
    """Return the positions of the tokens of a row in a padded row of this length."""
    return np.arange(len(row)) + (length - len(row) if left else 0)


def place_features(features: np.ndarray, pictures: list[list[Picture]], places: int) -> np.ndarray:
    """Return the features of one picture per row, repeated for each time that the row reads it.

    Args:
      features: [B, ...], of one picture per row.
      pictures: The pictures of each row, all the same one.
      places: The padded number of pictures of a row.

    Returns:
      [B, places, ...], zero where a row reads no picture.
    """
    out = np.zeros((len(pictures), places, *features.shape[1:]), features.dtype)
    for row_places, row, values in zip(out, pictures, features, strict=False):
        row_places[: len(row)] = values
    return out


def answer_positions(kind: np.ndarray) -> np.ndarray | None:
    """Return the positions of the answer tokens.

    Args:
      kind: int8[B, T], the kind of each token.

    Returns:
      int32[B, A], padded with -1 to a multiple of 8, or None if there is no answer.
    """
    answer = kind == tokens.CODE["answer"]
    most = answer.sum(-1).max()
    if not most:
        return None
    positions = np.full((len(kind), -(-most // 8) * 8), -1, np.int32)
    for row, is_answer in zip(positions, answer, strict=True):
        columns = np.flatnonzero(is_answer)
        row[: len(columns)] = columns
    return positions
