"""Arrays of a batch for attention to later tokens, and for positions with three axes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from mllm_jax import tokens
from mllm_jax.processors.rows import Row, token_columns

Forward = Literal["none", "picture", "prompt"]


def blocks(rows: list[Row], length: int, left: bool, forward: Forward) -> np.ndarray | None:
    """Return the block of each token, see `Batch.block`.

    Args:
      rows: The rows.
      length: The number of tokens T of a padded row.
      left: Whether rows are padded on the left.
      forward: The tokens with bidirectional attention: adjacent tokens of a picture (Gemma 3),
        those of the prompt (PaliGemma), or none.
    """
    if forward == "none":
        return None
    block = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        kind = row.column("kind")
        if forward == "prompt":
            number = (kind != tokens.CODE["answer"]).astype(int)
        else:
            image = kind == tokens.CODE["image"]
            begins = image & ~np.append(False, image[:-1])
            number = np.where(image, np.cumsum(begins), 0)
        block[b, token_columns(row, length, left)] = number
    return block if block.any() else None


def rotary_positions(rows: list[Row], length: int, left: bool) -> np.ndarray:
    """Return the time, row and column of each token, int32[3, B, T] (mRoPE, Wang et al. 2024).

    Text advances all three together; the tokens of a picture have one time, from which their row
    and column are counted; tokens after a picture continue after its longer side.
    """
    position = np.zeros((3, len(rows), length), np.int32)
    for b, row in enumerate(rows):
        at, segment = token_columns(row, length, left), np.array(row.segments, int)
        for number in range(1, segment.max(initial=0) + 1) or [0]:  # packed questions separately
            own = np.flatnonzero((segment == 0) | (segment == number))
            position[:, b, at[own]] = _of_sequence([row.tokens[i] for i in own])
    return position


def _of_sequence(sequence: list) -> np.ndarray:
    """Return the positions of tokens that follow each other, int[3, n]."""
    position, following = np.zeros((3, len(sequence)), int), 0
    start, tile = 0, -1
    for n, token in enumerate(sequence):
        if token.tile < 0:
            position[:, n] = following
        else:
            if token.tile != tile:
                start = following
            position[:, n] = start, start + token.row, start + token.column
        following = max(following, int(position[:, n].max()) + 1)
        tile = token.tile
    return position
