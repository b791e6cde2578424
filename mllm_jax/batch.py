"""The batch that one forward pass reads, and the layout of an image in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook, tokens
from mllm_jax.positions import Positions
from mllm_jax.typing import AnyArray, ArrayLike, Bool, Float, Int

_IMAGE = tokens.CODE["image"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tiles and the tokens of one image.

    Attributes:
      tiles: The number of square tiles of the image that the vision tower reads.
      patches: The patch of each image token in the LM, int32[n], numbered through the tiles; -1 for
        a newline.
      places: The row and column of each of these tokens on the grid of its tile, int[n, 2]; None
        if all tiles have the same square grid.
      runs: The number of these tokens at each occurrence of the image token in the text that
        replaces the picture; empty if all are at one occurrence.
      grid: The rows and columns of patches of a picture at its native resolution; None if tiles are
        squares.
      tile_grid: The rows and columns of tiles that a picture is cut into; 0, 0 if it is not cut.
      whole: The number of the tile that shows the whole picture; the others are its parts, in
        reading order.
      interpolation: The patches of which each token is a weighted sum, int[n, 4], and their
        weights, float32[n, 4]; None if each token comes from one patch.
    """

    tiles: int
    patches: Int[np.ndarray, " n"]
    places: Int[np.ndarray, "n 2"] | None = None
    runs: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    tile_grid: tuple[int, int] = (0, 0)
    whole: int = 0
    interpolation: tuple[Int[np.ndarray, "n 4"], Float[np.ndarray, "n 4"]] | None = None

    def grids(
        self, tokens: tokens.TokenMap, row: int = 0
    ) -> tuple[Int[np.ndarray, "rows columns"], Int[np.ndarray, "rows columns"]]:
        """Return the image tokens of a row of a batch, arranged as on its picture.

        Args:
          tokens: The token map of the batch.
          row: The row, which reads one picture, of this layout.

        Returns:
          The positions in the row of the tokens of the whole picture and of those of its parts,
          both arranged as on the picture; empty if there are none on a grid.
        """
        kind, tile, down, across = (
            np.asarray(array)[row]
            for array in (tokens.kind, tokens.tile, tokens.row, tokens.column)
        )
        on_grid = (kind == _IMAGE) & (down >= 0)
        is_whole = tile == self.whole
        whole = _arrange(np.flatnonzero(on_grid & is_whole), down, across)
        parts = np.flatnonzero(on_grid & ~is_whole)
        number = tile - (tile > self.whole)  # in reading order
        columns = max(self.tile_grid[1], 1)
        side = len(whole)  # of a tile
        down, across = number // columns * side + down, number % columns * side + across
        return whole, _arrange(parts, down, across)


def _arrange(
    at: Int[np.ndarray, " n"], down: Int[np.ndarray, " T"], across: Int[np.ndarray, " T"]
) -> Int[np.ndarray, "rows columns"]:
    """Return tokens arranged on their grid, which may lack some rows and columns."""
    rows = len(np.unique(down[at]))
    return at[np.lexsort((across[at], down[at]))].reshape(rows, -1 if rows else 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Image tokens that are weighted sums of the projector's, as bilinear resizing makes them.

    Attributes:
      index: The image tokens that are summed, int32[B, T, 4], counted as in
        `Batch.image_token_index`; -1 for text.
      weight: Their weights, float32[B, T, 4].
    """

    index: Int[AnyArray, "B T 4"]
    weight: Float[AnyArray, "B T 4"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass. Made by a processor; shapes are padded to a few lengths.

    Attributes:
      ids: The token ids, int32[B, T], including image placeholders.
      position: The position of each token in its row, int32[B, T].
      tokens: The token map of the LM.
      image_token_index: The number of the image token at each position, int32[B, T], counted
        through all tiles, with the newline last; -1 for text.
      pixels: The normalised tiles of all rows, equally many per row: float32[I, row, column, 3],
        or, for pictures of any size, their patches float32[I, P, pixel] (see `grid`).
      tile: The number of each tile within its row, int16[I].
      is_real_tile: False for tiles that only pad the batch, bool[I].
      features: Precomputed vision features, float[I, P, E], in place of pixels; or None.
      segment: The question that each token belongs to, int32[B, T], or None. Several questions
        about one picture share a row: a token attends to segment 0 (the picture) and its own.
      labels: The positions of the answer tokens, int32[B, A], padded with -1; or None.
      rotary_position: The time, row and column of each token, int32[3, B, T], for multimodal rotary
        embeddings (mRoPE); or None.
      block: The block of each token, int32[B, T], 0 for none, or None. The tokens of a block attend
        to each other whatever their order: a picture of Gemma 3, the prompt of PaliGemma.
      grid: The rows and columns of patches of each picture, int32[I, 2], 0 where there is none;
        None if all tiles are squares of one size.
      interpolation: How image tokens are interpolated from several, or None.
      qformer_ids: The question of each image in the Q-Former's own tokens, int32[I, T], or None.
      qformer_kind: The kinds of these tokens, int8[I, T], or None.
      processor: The processor that made the batch, which turns tokens into text. Static.
      shares_tiles: Whether rows read the tiles of other rows. If not, the tiles are those of the
        rows in order, equally many each. Static, because a mesh places the tiles by it.
    """

    ids: Int[AnyArray, "B T"]
    position: Int[AnyArray, "B T"]
    tokens: tokens.TokenMap
    image_token_index: Int[AnyArray, "B T"]
    pixels: Float[AnyArray, "I row column 3"] | Float[AnyArray, "I P pixel"]
    tile: Int[AnyArray, " I"]
    is_real_tile: Bool[AnyArray, " I"]
    features: Float[AnyArray, "I P E"] | None = None
    segment: Int[AnyArray, "B T"] | None = None
    labels: Int[AnyArray, "B A"] | None = None
    rotary_position: Int[AnyArray, "3 B T"] | None = None
    block: Int[AnyArray, "B T"] | None = None
    grid: Int[AnyArray, "I 2"] | None = None
    interpolation: Interpolation | None = None
    qformer_ids: Int[AnyArray, "I T"] | None = None
    qformer_kind: Int[AnyArray, "I T"] | None = None
    processor: Any = dataclasses.field(default=None, metadata={"static": True})
    shares_tiles: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def valid(self) -> Bool[AnyArray, "B T"]:
        """False for padding."""
        return self.tokens.valid

    @property
    def valid_row(self) -> Bool[AnyArray, " B"]:
        """False for rows that only pad the batch."""
        return self.tokens.valid_row

    @property
    def packed_rows(self) -> dict[int, int]:
        """The number of questions of each row that holds several; the batch must not be traced."""
        if self.segment is None:
            return {}
        questions = np.asarray(self.segment).max(-1)
        return {int(row): int(questions[row]) for row in np.flatnonzero(questions > 1)}

    @property
    def positions(self) -> Positions:
        """The positions of the tokens in the language model."""
        rotary, block = self.rotary_position, self.block
        return Positions(self.position, self.valid, rotary, self.segment, block)

    @property
    def last(self) -> Int[AnyArray, " B"]:
        """The last token of each row's prompt."""
        return self.tokens.last.argmax(-1)

    def replace(self, **fields) -> Batch:
        """Return the batch with other values of some fields."""
        return dataclasses.replace(self, **fields)

    def take(self, rows: Int[np.ndarray, " n"]) -> Batch:
        """Return the batch with the given rows, which may repeat and read the same pictures.

        Args:
          rows: The index of each row.
        """

        def pick(array: AnyArray) -> AnyArray:
            return array[np.asarray(rows)]

        fields = {name: jax.tree.map(pick, getattr(self, name)) for name in _OF_ROWS}
        rotary = self.rotary_position
        in_order = np.array_equal(rows, np.arange(len(self.ids)))
        return self.replace(
            rotary_position=None if rotary is None else rotary[:, np.asarray(rows)],
            shares_tiles=self.shares_tiles or not in_order,
            **fields,
        )

    def move_image_tokens(self, step: ArrayLike, before: int, after: int) -> Batch:
        """Return the batch with its image tokens renumbered for another set of tiles.

        Args:
          step: The number added to the index of each image token, int[B] or int[].
          before: The number of image tokens of the tiles so far; the newline comes after them.
          after: The number of image tokens of the other tiles.
        """

        def move(index: Int[AnyArray, "B T ..."]) -> Int[np.ndarray, "B T ..."]:
            index = np.asarray(index)
            steps = np.reshape(step, (-1, *(1,) * (index.ndim - 1)))
            moved = np.where(index == before, after, index + steps)
            return np.where(index < 0, -1, moved).astype(np.int32)

        interpolation = self.interpolation
        if interpolation is not None:
            interpolation = dataclasses.replace(interpolation, index=move(interpolation.index))
        index = move(self.image_token_index)
        return self.replace(image_token_index=index, interpolation=interpolation)

    def prompts(self) -> Batch:
        """Return the batch with only the prompts: the tokens after a prompt become padding.

        Raises:
          ValueError: A row holds several questions.
        """
        if self.segment is not None:
            _check_one_question(self)
        xp = np if isinstance(self.tokens.kind, np.ndarray) else jnp
        after = xp.arange(self.ids.shape[-1]) > self.last[:, None]
        kind = xp.where(after, np.int8(tokens.CODE["pad"]), self.tokens.kind)
        prompts = dataclasses.replace(self.tokens, kind=kind)
        return self.replace(tokens=prompts, segment=None, labels=None)

    def followed_by(self, ids: Int[AnyArray, "B n"], valid: Bool[AnyArray, "B n"]) -> Batch:
        """Return the batch with tokens of kind answer after each prompt.

        Args:
          ids: The ids of these tokens.
          valid: False for padding.
        """
        xp = np if isinstance(self.tokens.kind, np.ndarray) else jnp
        n = ids.shape[1]
        after = self.positions.after(self.last, jnp.arange(1, n + 1), jnp.asarray(valid))
        map_ = self.tokens.extended(n)
        is_pad = xp.concatenate([xp.zeros(self.ids.shape, bool), ~xp.asarray(valid)], 1)
        kind = xp.where(is_pad, np.int8(tokens.CODE["pad"]), map_.kind)

        def longer(array: AnyArray | None, new: Any, axis: int = 1) -> AnyArray | None:
            if array is None:
                return None
            shape = (*array.shape[:axis], n, *array.shape[axis + 1 :])
            added = xp.broadcast_to(xp.asarray(new, array.dtype), shape)
            return xp.concatenate([xp.asarray(array), added], axis)

        interpolation = self.interpolation
        if interpolation is not None:
            interpolation = jax.tree.map(lambda a: longer(a, -1), interpolation)
        return self.replace(
            ids=longer(self.ids, ids),
            position=longer(self.position, after.order),
            tokens=dataclasses.replace(map_, kind=kind),
            image_token_index=longer(self.image_token_index, -1),
            rotary_position=longer(self.rotary_position, after.rotary, 2),
            block=longer(self.block, 0),
            interpolation=interpolation,
        )

    def _fingerprint_(self) -> list[Any]:
        """Return the content that identifies the batch: its arrays, in order."""
        fields = (f.name for f in dataclasses.fields(self) if not f.metadata.get("static"))
        return [getattr(self, name) for name in fields]

    def _repr_html_(self) -> str:
        return notebook.batch(self)


# The fields with an entry for each row on their first axis, and for each tile.
_OF_ROWS = (
    "ids", "position", "tokens", "image_token_index", "segment", "labels", "block", "interpolation",
)  # fmt: skip
_OF_TILES = (
    "pixels", "tile", "is_real_tile", "features", "grid", "qformer_ids", "qformer_kind",
)  # fmt: skip


def join(first: Batch, second: Batch, tile_tokens: int) -> Batch:
    """Return a batch with the rows and the pictures of two batches of the same shapes.

    Args:
      first: The batch whose rows come first.
      second: The other.
      tile_tokens: The number of image tokens of a tile in the LM, `config.tile_tokens(batch)`.

    Raises:
      ValueError: The batches differ in a shape or in which fields they have.
    """
    tiles = len(first.tile), len(second.tile)
    places = [count * tile_tokens for count in tiles]
    first = first.move_image_tokens(0, places[0], sum(places))
    second = second.move_image_tokens(places[0], places[1], sum(places))

    def joined(name: str, axis: int = 0) -> Any:
        pair = getattr(first, name), getattr(second, name)
        leaves = [jax.tree.leaves(value) for value in pair]
        shapes = [[(*a.shape[:axis], *a.shape[axis + 1 :]) for a in each] for each in leaves]
        if shapes[0] != shapes[1]:
            full = [[a.shape for a in each] for each in leaves]
            raise ValueError(
                f"two batches with {name} of the shapes {full[0]} and {full[1]} cannot be joined: "
                "make both with the same length=, and pictures on equal grids"
            )
        return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis), *pair)

    shares = first.shares_tiles or second.shares_tiles
    shares = shares or len(first.ids) * tiles[1] != len(second.ids) * tiles[0]
    return first.replace(
        **{name: joined(name) for name in (*_OF_ROWS, *_OF_TILES)},
        rotary_position=joined("rotary_position", 1),
        shares_tiles=shares,
    )


def _check_one_question(batch: Batch) -> None:
    """Raise an error if a row holds several questions: which of them to continue is ambiguous."""
    if isinstance(batch.segment, jax.core.Tracer):
        raise ValueError(
            "packed rows inside a transformation of JAX: the number of questions in a row is "
            "unknown there; processor.unpack(batch) gives one question per row"
        )
    if packed := batch.packed_rows:
        row = min(packed)
        raise ValueError(
            f"row {row} holds {packed[row]} packed questions: "
            "generate and score read one prompt per row; processor.unpack(batch) gives such rows"
        )
