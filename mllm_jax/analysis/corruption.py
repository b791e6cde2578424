"""Corrupt pictures: replacements of the clean picture of a contrast; see `patching`.

The text, the number of tokens and their positions are unchanged, so that each token of the clean
batch corresponds to a token of the corrupt one. If a batch has vision features in place of pixels,
its features are corrupted.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.interventions.model import Model
from mllm_jax.numerics import precision
from mllm_jax.typing import Bool, Float, Int


def noise(batch: Batch, *, scale: float = 3.0, seed: int = 0) -> Batch:
    """Add Gaussian noise to the pictures.

    Args:
      batch: The clean batch.
      scale: The standard deviation of the noise, as a multiple of that of the pictures' own values
        (Meng et al. 2022 use 3 at the embeddings).
      seed: The seed of the noise.
    """
    name, values, real = _pictures(batch)
    wide = _wide(values)
    spread = wide[real if values.ndim > 3 else _places(batch, values) & real[:, None]].std()
    drawn = np.random.default_rng(seed).normal(size=values.shape).astype(wide.dtype)
    noisy = np.where(_expand(real, values), wide + scale * spread * drawn, wide)
    return batch.replace(**{name: noisy.astype(values.dtype)})


def mean(batch: Batch) -> Batch:
    """Replace each picture by its mean: one colour per tile, or one patch at all positions."""
    name, values, real = _pictures(batch)
    wide = _wide(values)
    if values.ndim == 3:
        counted = _places(batch, values)[..., None]
        total = np.where(counted, wide, 0).sum(1, keepdims=True)
        average = total / np.maximum(counted.sum(1)[:, None], 1)
    else:
        average = wide.mean((1, 2), keepdims=True)
    flat = np.where(_expand(real, values), average, wide)
    return batch.replace(**{name: flat.astype(values.dtype)})


def exchange(model: Model, batch: Batch, pictures_of: Int[np.ndarray, " B"]) -> Batch:
    """Give each row the pictures of another row.

    Args:
      model: The model that reads the batch.
      batch: The clean batch.
      pictures_of: The row whose pictures each row gets, int[B].

    Raises:
      ValueError: The pictures of two rows have different grids.
    """
    batch = model.unshared(batch)
    source, rows = np.asarray(pictures_of), len(batch.ids)
    if source.shape != (rows,) or ((source < 0) | (source >= rows)).any():
        raise ValueError(f"pictures_of={source.tolist()} must give a row for each of {rows} rows")
    _check_grids(batch, source)
    readers, at = np.asarray(model.config.readers(batch)), np.arange(len(batch.tile))
    for row, other in enumerate(source):
        at[readers[row]] = np.flatnonzero(readers[other])
    fields = {name: getattr(batch, name) for name in ("pixels", "features", "grid", "is_real_tile")}
    return batch.replace(
        **{n: None if a is None or not len(a) else np.asarray(a)[at] for n, a in fields.items()}
    )


def _check_grids(batch: Batch, source: Int[np.ndarray, " B"]) -> None:
    kind, *places = (
        np.asarray(getattr(batch.tokens, name)) for name in ("kind", "tile", "row", "column")
    )
    is_picture = (kind == tokens.CODE["image"]) | (kind == tokens.CODE["newline"])
    for row, other in enumerate(source.tolist()):
        own, theirs = ([p[r][is_picture[r]] for p in (kind, *places)] for r in (row, other))
        if any(len(a) != len(b) or (a != b).any() for a, b in zip(own, theirs, strict=True)):
            raise ValueError(
                f"row {row} cannot get the pictures of row {other}: their grids differ "
                f"({len(own[0])} and {len(theirs[0])} tokens); choose pictures of one size"
            )


def _pictures(
    batch: Batch,
) -> tuple[Literal["features", "pixels"], Float[np.ndarray, "I ..."], Bool[np.ndarray, " I"]]:
    """Return the field that holds the pictures, its values, and which tiles are real."""
    real = np.asarray(batch.is_real_tile)
    if not real.any():
        raise ValueError("the batch has no picture that could be corrupted")
    name: Literal["features", "pixels"] = "pixels" if batch.features is None else "features"
    return name, np.asarray(getattr(batch, name)), real


def _places(batch: Batch, values: Float[np.ndarray, "I P n"]) -> Bool[np.ndarray, "I P"]:
    """Return which positions of each tile hold a patch."""
    if batch.grid is None:
        return np.ones(values.shape[:2], bool)
    return np.arange(values.shape[1]) < np.asarray(batch.grid).prod(-1)[:, None]


def _wide(values: Float[np.ndarray, "I ..."]) -> Float[np.ndarray, "I ..."]:
    """Return values in float32 or wider: NumPy sums narrower ones in their own dtype."""
    return values.astype(precision.at_least_float32_dtype(values.dtype))


def _expand(real: Bool[np.ndarray, " I"], values: Float[np.ndarray, "I ..."]) -> np.ndarray:
    return real.reshape(-1, *(1,) * (values.ndim - 1))
