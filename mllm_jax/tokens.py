"""Token kinds: which tokens an edit or a capture means.

A token map travels with every module of a batch and says of each position what it is. A
selector such as `tokens.image`, `tokens.text & ~tokens.last` or `tokens.row(3)` is resolved
against that map, so user code does no index arithmetic, and no padding is ever selected.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, TypeAlias

import jax
import numpy as np

from mllm_jax.typing import AnyArray

KINDS = ("pad", "system", "question", "image", "newline", "answer", "cls", "query")
CODE = {name: code for code, name in enumerate(KINDS)}
TEXT = ("system", "question", "answer")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMap:
    """What each token of one module is. B is rows, or image tiles for the vision side.

    Attributes:
      kind: int8[B, T], a code of KINDS.
      row: int16[B, T], row on the patch grid of the tile, -1 elsewhere.
      column: int16[B, T], column on that grid, -1 elsewhere.
      tile: int16[B, T], image tile within the row, -1 elsewhere. LLaVA: the number of the picture.
        LLaVA-NeXT: 0 is the whole picture made small, and its parts follow in reading order; the
        next picture of the row begins at `config.tiles`, however many parts the first has.
      last: bool[B, T], the last token of the prompt.
      added: how many of the T were added after the prompt, to be generated or scored. Static.
      readers: bool[rows, B] of the vision side, which rows of the batch read each tile: rows that
        share a picture share its tiles. None where B are the rows themselves.
    """

    kind: Any
    row: Any
    column: Any
    tile: Any
    last: Any
    added: int = dataclasses.field(default=0, metadata={"static": True})
    readers: Any = None

    @classmethod
    def grid(cls, tiles: Any, side: tuple[int, int], cls_token: bool, real: Any) -> TokenMap:
        """The map of image tiles: a grid of patches, with or without a CLS token before it.

        Args:
          tiles: int[I], number of the tile within its row of the batch.
          side: rows and columns of the grid.
          cls_token: whether position 0 is CLS.
          real: bool[I], False for tiles that only fill the batch.
        """
        rows, columns = np.divmod(np.arange(side[0] * side[1]), side[1])
        kind = np.full(rows.shape, CODE["image"])
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
    def plain(cls, kind: Any, tiles: Any) -> TokenMap:
        """The map of tokens that are on no grid.

        Args:
          kind: int8[I, T].
          tiles: int[I], number of the tile that they belong to.
        """
        xp = np if isinstance(kind, np.ndarray) else jax.numpy
        nowhere = xp.full(kind.shape, -1, np.int16)
        tile = xp.broadcast_to(xp.asarray(tiles)[:, None].astype(np.int16), kind.shape)
        return cls(kind, nowhere, nowhere, tile, xp.zeros(kind.shape, bool))

    @classmethod
    def alike(cls, name: str, count: int, tiles: Any, real: Any) -> TokenMap:
        """`plain`, with `count` tokens of one kind for each tile that is real."""
        xp = np if isinstance(real, np.ndarray) else jax.numpy
        kind = xp.where(real, CODE[name], CODE["pad"]).astype(np.int8)
        return cls.plain(xp.broadcast_to(kind[:, None], (len(kind), count)), tiles)

    def followed_by(self, other: TokenMap) -> TokenMap:
        """These tokens of each row, then those."""
        xp = np if isinstance(self.kind, np.ndarray) else jax.numpy
        return jax.tree.map(lambda a, b: xp.concatenate([a, b], 1), self, other)

    def extended(self, steps: int) -> TokenMap:
        """With `steps` generated tokens after the prompt: of kind answer, but in empty rows."""
        xp = np if isinstance(self.kind, np.ndarray) else jax.numpy
        real = (self.kind != CODE["pad"]).any(-1, keepdims=True)
        fill = {
            "kind": xp.where(real, CODE["answer"], CODE["pad"]),
            "row": -1, "column": -1, "tile": -1, "last": False,
        }  # fmt: skip

        def longer(array, value):
            new = xp.broadcast_to(xp.asarray(value, array.dtype), (len(array), steps))
            return xp.concatenate([array, new], 1)

        columns = {name: longer(getattr(self, name), fill[name]) for name in fill}
        return TokenMap(**columns, added=self.added + steps)

    @property
    def step(self) -> Any:
        """int32[B, T], the step of generation that reads a token.

        Step 0 reads the prompt and chooses the first token of the answer; step i reads the i-th
        token of the answer and chooses the next.
        """
        xp = np if isinstance(self.kind, np.ndarray) else jax.numpy
        said = self.kind == CODE["answer"]
        count = xp.cumsum(said, -1, dtype=np.int32)
        # Several questions may share a row: after every token of a prompt the count begins anew.
        prompt = xp.where(said | (self.kind == CODE["pad"]), 0, count)
        return count - (np.maximum.accumulate if xp is np else jax.lax.cummax)(prompt, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """Some tokens. Combine with |, & and ~.

    Attributes:
      form: how it is resolved. Static.
      parts: selectors it is made of.
      value: data: kind codes, an index, or an explicit mask bool[B, T].
    """

    form: str = dataclasses.field(metadata={"static": True})
    parts: tuple[Where, ...] = ()
    value: Any = None

    def __or__(self, other: Where) -> Where:
        return Where("or", (self, other))

    def __and__(self, other: Where) -> Where:
        return Where("and", (self, other))

    def __invert__(self) -> Where:
        return Where("not", (self,))

    def mask(self, tokens: TokenMap) -> Any:
        """bool[B, T]: the selected tokens, padding excluded."""
        return self._resolve(tokens) & (tokens.kind != CODE["pad"])

    def _resolve(self, tokens: TokenMap) -> Any:
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
            of = _prompt_mask if tokens.readers is None else _tile_mask
            return of(self.value, tokens)
        if self.form == "kind":
            return (tokens.kind[..., None] == self.value).any(-1)
        at = getattr(tokens, self.form)
        return (at == self.value) & (at >= 0)


# What a user may give as a selector of tokens: `of` reads it.
Selector: TypeAlias = Where | str | AnyArray | None


def _prompt_mask(mask, tokens: TokenMap) -> Any:
    """An explicit mask bool[B, T]; one of the prompt alone selects nothing after it."""
    rows, length = tokens.kind.shape
    prompt = length - tokens.added
    if tuple(mask.shape) not in ((rows, length), (rows, prompt)):
        raise ValueError(
            f"the token mask is {tuple(mask.shape)}, the batch has tokens {(rows, prompt)}"
        )
    xp = np if isinstance(mask, np.ndarray) else jax.numpy
    return xp.pad(mask, ((0, 0), (0, length - mask.shape[1])))


def _tile_mask(mask, tokens: TokenMap) -> Any:
    """An explicit mask of the vision side: by tile bool[I, P], or by row bool[B, tiles, P].

    By row, the tiles of a row are counted as `tile` counts them; rows that share a picture must say
    the same of it.
    """
    (rows, tiles), (_, length) = tokens.readers.shape, tokens.kind.shape
    arrays = mask, tokens.readers, tokens.tile
    known = not any(isinstance(array, jax.core.Tracer) for array in arrays)
    mask, readers, number = map(np.asarray if known else jax.numpy.asarray, arrays)
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
            f"the token mask is of {mask.shape[1]} tiles a row, the batch has {number.max() + 1}"
        )
    said = mask[:, number.clip(0, mask.shape[1] - 1)]  # [B, I, P]
    chosen = (said & readers[:, :, None]).any(0)
    if known and ((said != chosen) & readers[:, :, None]).any():
        raise ValueError(
            "rows that share a picture have different token masks for it: give each row a picture "
            "of its own with model.unshared(batch)"
        )
    return chosen


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
    """Image tokens in one row of the patch grid."""
    return _grid("row", index)


def column(index) -> Where:
    """Image tokens in one column of the patch grid."""
    return _grid("column", index)


def tile(index) -> Where:
    """Image tokens of one tile."""
    return _grid("tile", index)


def _grid(form: str, index) -> Where:
    if isinstance(index, jax.core.Tracer):
        return Where(form, value=index.astype(np.int32))
    if index < 0:
        raise ValueError(f"{form} {index}: they are counted from 0")
    return Where(form, value=np.int32(index))


def mask(array) -> Where:
    """Exactly these tokens: bool[B, T].

    On the vision side (vision, Q-Former, projector) a mask is by tile, bool[I, P] in the order of
    `batch.tile`, or by row, bool[B, tiles, P].
    """
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.dtype != bool:
        raise TypeError(f"a token mask is bool[B, T], not {array.dtype}")
    if array.ndim not in (2, 3):
        raise ValueError(f"a token mask is bool[B, T] or bool[B, tiles, P], not {array.shape}")
    return Where("mask", value=array)


def of(selector) -> Where:
    """A selector from what a user may give: a selector, a mask, or nothing (all tokens)."""
    if selector is None:
        return every
    if isinstance(selector, Where):
        return selector
    if isinstance(selector, str):
        if selector not in NAMED:
            raise KeyError(f"unknown token kind '{selector}'; known: {', '.join(NAMED)}")
        return NAMED[selector]
    return mask(selector)


NAMED = {name: globals()[name] for name in (*KINDS[1:], "text", "every", "last", "generating")}
NAMED["all"] = every  # as edits were written before


def __getattr__(name: str) -> Where:
    """Return the selectors that had another name before."""
    if name == "all":
        warnings.warn("tokens.all is called tokens.every", DeprecationWarning, stacklevel=2)
        return every
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
