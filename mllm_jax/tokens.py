"""Token kinds and selectors: the tokens of an edit or a capture.

Each module has a token map, which holds the kind and the position of every token of a batch. A
selector such as `tokens.image`, `tokens.text & ~tokens.last` or `tokens.row(3)` is resolved
against that map, so user code does no index arithmetic, and padding is never selected.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeAlias, cast

import jax
import numpy as np

from mllm_jax import deprecated
from mllm_jax.arguments import require_whole
from mllm_jax.token_names import KINDS, SELECTORS, TEXT
from mllm_jax.typing import AnyArray, Bool, Int

CODE = {name: code for code, name in enumerate(KINDS)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMap:
    """The kind and the position of each token of one module.

    B counts the rows of the batch, or its image tiles on the vision side.

    Attributes:
      kind: The kind, a code of `KINDS`, int8[B, T].
      row: The row on the patch grid of the tile, int16[B, T]; -1 elsewhere.
      column: The column on that grid, int16[B, T]; -1 elsewhere.
      tile: The image tile within the row, int16[B, T]; -1 elsewhere. In LLaVA it is the number of
        the picture. In LLaVA-NeXT tile 0 is the whole picture, scaled down, and its parts follow in
        reading order; the next picture of the row starts at `config.tiles`, however many parts the
        first has. In LLaVA-OneVision with several pictures it is the number of the picture.
      last: True at the last token of the prompt, or of each packed question, bool[B, T].
      added: The number of the T tokens added after the prompt, to be generated or scored. Static.
      readers: Which rows of the batch read each tile, bool[rows, B], on the vision side: rows that
        share a picture share its tiles. None if B counts rows.
    """

    kind: Int[AnyArray, "B T"]
    row: Int[AnyArray, "B T"]
    column: Int[AnyArray, "B T"]
    tile: Int[AnyArray, "B T"]
    last: Bool[AnyArray, "B T"]
    added: int = dataclasses.field(default=0, metadata={"static": True})
    readers: Bool[AnyArray, "rows B"] | None = None

    @classmethod
    def grid(
        cls,
        tiles: Int[AnyArray, " I"],
        side: tuple[int, int],
        cls_token: bool,
        real: Bool[AnyArray, " I"],
    ) -> TokenMap:
        """Return the map of image tiles: a grid of patches, after a CLS token if there is one.

        Args:
          tiles: The number of each tile within its row of the batch.
          side: The rows and columns of the grid.
          cls_token: Whether position 0 is CLS.
          real: False for tiles that only pad the batch.
        """
        rows, columns = np.divmod(np.arange(side[0] * side[1]), side[1])
        kind: np.ndarray = np.full(rows.shape, CODE["image"])
        if cls_token:
            rows, columns = np.append(-1, rows), np.append(-1, columns)
            kind = np.append(CODE["cls"], kind)
        xp = np if isinstance(real, np.ndarray) else jax.numpy
        kind = xp.where(real[:, None], kind[None], CODE["pad"]).astype(np.int8)
        return dataclasses.replace(
            cls.plain(kind, tiles),
            row=xp.broadcast_to(rows.astype(np.int16), kind.shape),
            column=xp.broadcast_to(columns.astype(np.int16), kind.shape),
        )

    @classmethod
    def free_grid(
        cls,
        tiles: Int[AnyArray, " I"],
        grid: Int[AnyArray, "I 2"],
        places: int,
        merge: int = 1,
    ) -> TokenMap:
        """Return the map of pictures of any size, each with its own grid of patches.

        Args:
          tiles: The number of each picture within its row of the batch.
          grid: The rows and columns of each picture; 0 if there is none.
          places: The padded number P of patches.
          merge: The side of the squares in which patches are grouped; the squares follow each other
            row by row, as do the patches in each.
        """
        xp: Any = np if isinstance(grid, np.ndarray) else jax.numpy
        rows, columns = grid[:, :1], grid[:, 1:]
        square, within = np.divmod(np.arange(places)[None], merge**2)
        across = xp.maximum(columns // merge, 1)
        row = square // across * merge + within // merge
        column = square % across * merge + within % merge
        real = np.arange(places)[None] < rows * columns
        kind = xp.where(real, CODE["image"], CODE["pad"]).astype(np.int8)
        return dataclasses.replace(
            cls.plain(kind, tiles),
            row=xp.where(real, row, -1).astype(np.int16),
            column=xp.where(real, column, -1).astype(np.int16),
        )

    @classmethod
    def plain(cls, kind: Int[AnyArray, "I T"], tiles: Int[AnyArray, " I"]) -> TokenMap:
        """Return the map of tokens that are not on a grid.

        Args:
          kind: The kind of each token.
          tiles: The number of the tile that the tokens belong to.
        """
        xp = np if isinstance(kind, np.ndarray) else jax.numpy
        nowhere = xp.full(kind.shape, -1, np.int16)
        tile = xp.broadcast_to(xp.asarray(tiles)[:, None].astype(np.int16), kind.shape)
        return cls(kind, nowhere, nowhere, tile, xp.zeros(kind.shape, bool))

    @classmethod
    def alike(
        cls, name: str, count: int, tiles: Int[AnyArray, " I"], real: Bool[AnyArray, " I"]
    ) -> TokenMap:
        """Return the map of `count` tokens of one kind for each real tile."""
        xp = np if isinstance(real, np.ndarray) else jax.numpy
        kind = xp.where(real, CODE[name], CODE["pad"]).astype(np.int8)
        return cls.plain(xp.broadcast_to(kind[:, None], (len(kind), count)), tiles)

    def followed_by(self, other: TokenMap) -> TokenMap:
        """Return the map of these tokens of each row, followed by those of `other`."""
        xp = np if isinstance(self.kind, np.ndarray) else jax.numpy
        return jax.tree.map(lambda a, b: xp.concatenate([a, b], 1), self, other)

    @property
    def valid(self) -> Bool[AnyArray, "B T"]:
        """False for padding."""
        return self.kind != CODE["pad"]

    @property
    def valid_row(self) -> Bool[AnyArray, " B"]:
        """False for rows that only pad the batch."""
        return cast(AnyArray, self.valid.any(-1))

    def extended(self, steps: int) -> TokenMap:
        """Return the map with `steps` generated tokens after each prompt, padding in empty rows."""
        xp = np if isinstance(self.kind, np.ndarray) else jax.numpy
        fill = {
            "kind": xp.where(self.valid_row[:, None], CODE["answer"], CODE["pad"]),
            "row": -1, "column": -1, "tile": -1, "last": False,
        }  # fmt: skip

        def longer(array, value):
            new = xp.broadcast_to(xp.asarray(value, array.dtype), (len(array), steps))
            return xp.concatenate([array, new], 1)

        columns = {name: longer(getattr(self, name), fill[name]) for name in fill}
        return TokenMap(**columns, added=self.added + steps)

    @property
    def step(self) -> Int[AnyArray, "B T"]:
        """The step of generation that reads each token.

        Step 0 reads the prompt and chooses the first token of the answer; step i reads the i-th
        token of the answer and chooses the next.
        """
        xp = np if isinstance(self.kind, np.ndarray) else jax.numpy
        is_answer = self.kind == CODE["answer"]
        count = xp.cumsum(is_answer, -1, dtype=np.int32)
        # Several questions may share a row: the count restarts after every token of a prompt.
        prompt = xp.where(is_answer | ~self.valid, 0, count)
        return count - (np.maximum.accumulate if xp is np else jax.lax.cummax)(prompt, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """A selector of tokens. Combine selectors with |, & and ~.

    Attributes:
      form: How it is resolved: "kind", "last", "row", "column", "tile", "mask", "and", "or" or
        "not". Static.
      parts: The selectors that it combines.
      value: Its data: kind codes int8[n], an index int32[], or an explicit mask bool[B, T].
    """

    form: str = dataclasses.field(metadata={"static": True})
    parts: tuple[Where, ...] = ()
    value: AnyArray | np.int32 | None = None

    __array_ufunc__ = None  # a mask of NumPy leaves | and & to the selector

    def __or__(self, other: Selector) -> Where:
        return Where("or", (self, _operand(other)))

    def __and__(self, other: Selector) -> Where:
        return Where("and", (self, _operand(other)))

    __ror__, __rand__ = __or__, __and__

    def __invert__(self) -> Where:
        return Where("not", (self,))

    def __bool__(self) -> bool:
        raise ValueError("a selector of tokens is not a bool: combine selectors with &, |, ~")

    def mask(self, tokens: TokenMap) -> Bool[AnyArray, "B T"]:
        """Return the selected tokens of a module, without padding."""
        return self._resolve(tokens) & tokens.valid

    def _resolve(self, tokens: TokenMap) -> Bool[AnyArray, "B T"]:
        parts = [part._resolve(tokens) for part in self.parts]
        if self.form == "or":
            return parts[0] | parts[1]
        if self.form == "and":
            return parts[0] & parts[1]
        if self.form == "not":
            return ~parts[0]
        if self.form == "last":
            return tokens.last
        if self.form == "mask":
            fit = _prompt_mask if tokens.readers is None else _tile_mask
            return fit(cast(AnyArray, self.value), tokens)
        if self.form == "kind":
            return (tokens.kind[..., None] == cast(AnyArray, self.value)).any(-1)
        at = getattr(tokens, self.form)
        return (at == self.value) & (at >= 0)


# Values that a user may give as a selector of tokens; `of` converts them.
Selector: TypeAlias = Where | str | AnyArray | None


def _operand(selector: Selector) -> Where:
    """Return a selector as an operand; None is not allowed there."""
    if selector is None:
        raise ValueError("a selector of tokens is combined with another, not with None")
    return selector if isinstance(selector, Where) else of(selector)


def _prompt_mask(mask: Bool[AnyArray, "B T"], tokens: TokenMap) -> Bool[AnyArray, "B T"]:
    """Return an explicit mask; a mask of only the prompt selects nothing after it."""
    rows, length = tokens.kind.shape
    prompt = length - tokens.added
    if tuple(mask.shape) not in ((rows, length), (rows, prompt)):
        raise ValueError(
            f"the token mask is {tuple(mask.shape)}, but the batch has tokens {(rows, prompt)}"
        )
    xp = np if isinstance(mask, np.ndarray) else jax.numpy
    return xp.pad(mask, ((0, 0), (0, length - mask.shape[1])))


def _tile_mask(mask: Bool[AnyArray, ...], tokens: TokenMap) -> Bool[AnyArray, "I P"]:
    """Return an explicit mask of the vision side, given by tile [I, P] or by row [B, tiles, P].

    A mask by row numbers the tiles of a row as `TokenMap.tile` does; rows that share a picture must
    select the same tokens of it.
    """
    assert tokens.readers is not None, "a module of tiles has readers"
    (rows, tiles), (_, length) = tokens.readers.shape, tokens.kind.shape
    arrays = mask, tokens.readers, tokens.tile
    known = not any(isinstance(array, jax.core.Tracer) for array in arrays)
    xp: Any = np if known else jax.numpy
    mask, readers, number = map(xp.asarray, arrays)
    if mask.shape == (tiles, length):
        if known and rows == tiles and (readers & ~np.eye(rows, dtype=bool)).any():
            raise ValueError(
                f"the token mask {mask.shape} may be by row or by tile, which differ in this batch "
                "(see batch.tile): give it by row, bool[rows, tiles, tokens]"
            )
        return mask
    if mask.ndim != 3 or (mask.shape[0], mask.shape[2]) != (rows, length):
        raise ValueError(
            f"the token mask is {tuple(mask.shape)}, the site has tokens {(tiles, length)} by tile "
            f"or ({rows}, tiles of a row, {length}) by row"
        )
    number = number[:, 0]
    if known and (number[readers.any(0)] >= mask.shape[1]).any():
        raise ValueError(
            f"the token mask has {mask.shape[1]} tiles per row, the batch has {number.max() + 1}"
        )
    by_row = mask[:, number.clip(0, mask.shape[1] - 1)]  # [B, I, P]
    selected = (by_row & readers[:, :, None]).any(0)
    if known and ((by_row != selected) & readers[:, :, None]).any():
        raise ValueError(
            "rows that share a picture have different token masks for it: give each row its own "
            "picture with model.unshared(batch)"
        )
    return selected


def _kinds(*names: str) -> Where:
    codes = np.full(len(KINDS), -1, np.int8)  # one length, so that kinds are data, not structure
    codes[: len(names)] = [CODE[name] for name in names]
    return Where("kind", value=codes)


system, question, image, newline, answer, cls, query = (_kinds(name) for name in KINDS[1:])
text = _kinds(*TEXT)
every = _kinds(*KINDS[1:])
last = Where("last")
generating = last | answer  # each token at which the next one is chosen, in `generate` and `score`
kind = KINDS[1:]  # for `by=`: the kinds that statistics are split by


def row(index) -> Where:
    """Select the image tokens in one row of the patch grid."""
    return _grid("row", index)


def column(index) -> Where:
    """Select the image tokens in one column of the patch grid."""
    return _grid("column", index)


def tile(index) -> Where:
    """Select the image tokens of one tile."""
    return _grid("tile", index)


def _grid(form: str, index) -> Where:
    if isinstance(index, jax.core.Tracer):
        return Where(form, value=index.astype(np.int32))
    return Where(form, value=np.int32(require_whole(form, index, least=0)))


def mask(array: Bool[AnyArray, ...]) -> Where:
    """Select exactly these tokens.

    Args:
      array: A mask bool[B, T]. On the vision side (vision tower, Q-Former, projector) it is a mask
        by tile, bool[I, P] in the order of `batch.tile`, or by row, bool[B, tiles, P].
    """
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.dtype != bool:
        raise TypeError(f"a token mask is bool[B, T], not {array.dtype}")
    if array.ndim not in (2, 3):
        raise ValueError(f"a token mask is bool[B, T] or bool[B, tiles, P], not {array.shape}")
    return Where("mask", value=array)


def of(selector: Selector) -> Where:
    """Return the selector for a selector, a name, a mask or None (all tokens).

    Raises:
      KeyError: A name is unknown.
    """
    if selector is None:
        return every
    if isinstance(selector, Where):
        return selector
    if isinstance(selector, str):
        if selector not in NAMED:
            raise KeyError(f"unknown token kind '{selector}'; known: {', '.join(NAMED)}")
        return NAMED[selector]
    return mask(selector)


# "all" is the name of `every` in older text.
NAMED = {name: every if name == "all" else globals()[name] for name in SELECTORS}


__getattr__ = functools.partial(deprecated.member, __name__)
