"""Pack several questions about one picture in one row, and unpack them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mllm_jax import tokens
from mllm_jax.batch import Batch, Interpolation
from mllm_jax.files import shown
from mllm_jax.processors import rows
from mllm_jax.processors.prompts import as_list


def parse_turns(turns: Any) -> list[list[tuple[str, str]]]:
    """Return the (question, answer) pairs of each row.

    Raises:
      ValueError: A row has no question, or an item that is not a pair of strings.
    """
    return [_parse_pairs(pairs, row) for row, pairs in enumerate(as_list(turns, "turns"))]


def _parse_pairs(pairs: Any, row: int) -> list[tuple[str, str]]:
    parsed = [tuple(as_list(pair, f"turns, row {row}", "pairs")) for pair in pairs]
    if not parsed:
        raise ValueError(f"turns, row {row}: there is no question")
    for number, pair in enumerate(parsed, 1):
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair) or not pair[0].strip():
            raise ValueError(
                f"turns, row {row}, question {number}: {shown(pair)} is not a pair of a non-empty "
                "question and its answer"
            )
    return parsed


def unpack(batch: Batch, tiles: int, padding_id: int) -> Batch:
    """Return a packed batch with one row per question.

    Args:
      batch: The packed batch.
      tiles: The number of tiles to which the pictures of a question are padded.
      padding_id: The id of padding.

    Raises:
      ValueError: The batch is not packed.
    """
    if batch.segment is None:
        raise ValueError("the batch is not packed: it has one question per row already")
    segment, kind = np.asarray(batch.segment), np.asarray(batch.tokens.kind)
    columns = [
        np.flatnonzero(((segment[b] == 0) & (kind[b] != tokens.CODE["pad"])) | (segment[b] == s))
        for b, s in _questions(segment)
    ]
    source = np.array([b for b, _ in _questions(segment)])[:, None]
    T = rows.round_up_length(max(map(len, columns)))
    index = np.zeros((len(columns), T), np.int64)
    filled = np.arange(T) < np.array([len(c) for c in columns])[:, None]
    for row, row_columns in zip(index, columns, strict=True):
        row[: len(row_columns)] = row_columns

    def select(values: Any, padding: int) -> np.ndarray:
        values = np.asarray(values)
        return np.where(filled, values[source, index], padding).astype(values.dtype)

    new_kind = select(kind, tokens.CODE["pad"])
    before_answer = filled & (new_kind != tokens.CODE["answer"])
    tile = select(batch.tokens.tile, -1)
    token_map = tokens.TokenMap(
        kind=new_kind,
        last=np.arange(T) == before_answer.sum(1, keepdims=True) - 1,
        row=select(batch.tokens.row, -1),
        column=select(batch.tokens.column, -1),
        tile=np.where(tile < 0, tile, tile % tiles).astype(tile.dtype),
    )
    return dataclasses.replace(
        batch,
        ids=select(batch.ids, padding_id),
        position=select(batch.position, 0),
        tokens=token_map,
        image_token_index=select(batch.image_token_index, -1),
        tile=np.asarray(batch.tile) % np.int16(tiles),
        segment=None,
        rotary_position=_select_axes(batch.rotary_position, select),
        block=None if batch.block is None else select(batch.block, 0),
        interpolation=_select_sources(batch.interpolation, select),
        labels=rows.answer_positions(new_kind),
        shares_tiles=True,
    )


def _select_axes(position: Any, select: Callable[[Any, int], np.ndarray]) -> np.ndarray | None:
    """Return positions of three axes, each selected; or None."""
    return None if position is None else np.stack([select(axis, 0) for axis in position])


def _select_sources(
    interpolation: Interpolation | None, select: Callable[[Any, int], np.ndarray]
) -> Interpolation | None:
    """Return an interpolation with each of its sources selected; or None."""
    if interpolation is None:
        return None
    pairs = (interpolation.index, -1), (interpolation.weight, 0)
    return Interpolation(
        *(
            np.stack([select(np.asarray(array)[..., n], padding) for n in range(4)], -1)
            for array, padding in pairs
        )
    )


def _questions(segment: np.ndarray) -> list[tuple[int, int]]:
    """Return (row, segment) of each question of a packed batch."""
    return [(b, s) for b, row in enumerate(segment) for s in range(1, int(row.max()) + 1)]
