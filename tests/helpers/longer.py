"""Prompts with tokens after them, as plain batches: what a cached pass is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm_jax import tokens
from mllm_jax.batch import Batch


def continued(batch: Batch, said: Sequence[Sequence[int]]) -> Batch:
    """Each row its prompt without padding, then what was said, then padding."""
    rows = [np.flatnonzero(valid) for valid in batch.valid]
    T = max(len(row) + len(more) for row, more in zip(rows, said, strict=True))

    def put(array, fill, new=None):
        out = np.full((len(rows), T), fill, array.dtype)
        for b, (row, more) in enumerate(zip(rows, said, strict=True)):
            out[b, : len(row)] = array[b, row]
            if new is not None:
                out[b, len(row) : len(row) + len(more)] = new if np.isscalar(new) else new[b]
        return out

    ends = [np.arange(len(more)) + len(row) for row, more in zip(rows, said, strict=True)]
    map_ = batch.tokens
    return batch.replace(
        ids=put(batch.ids, 0, [np.asarray(more) for more in said]),
        position=put(batch.position, 0, ends),
        image_token_index=put(batch.image_token_index, -1),
        tokens=tokens.TokenMap(
            kind=put(map_.kind, tokens.CODE["pad"], tokens.CODE["answer"]),
            row=put(map_.row, -1), column=put(map_.column, -1), tile=put(map_.tile, -1),
            last=put(map_.last, False),
        ),
    )  # fmt: skip


def places(batch: Batch, said: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Where in `continued` each said token is predicted: one place before it stands."""
    return [valid.sum() - 1 + np.arange(len(s)) for valid, s in zip(batch.valid, said, strict=True)]
