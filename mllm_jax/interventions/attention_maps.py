"""Attention, reduced in the pass: mass on groups of keys, attention on each key, rollout, maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook_results
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.numerics.precision import at_least_float32, full_einsum
from mllm_jax.tokens import CODE, TokenMap
from mllm_jax.typing import AnyArray, Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mass:
    """The mean attention of the selected queries to groups of keys.

    Attributes:
      values: The mass, float32[L, B, N, kinds]; without N for the mean over heads.
      kinds: The names along the last axis: kinds of token, or "tile 0" and so on. Static.
    """

    values: Float[AnyArray, "L B N kinds"]
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def _repr_html_(self) -> str:
        return notebook_results.mass(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """The mean attention of the selected queries to each key; `maps` lays it out on pictures.

    Attributes:
      values: The attention to each key, 0 where not selected: float32[L, B, N, S]; without N for
        the mean over heads and for a rollout. On the vision side B counts the tiles of the batch.
      keys: The token map of the keys; those that are not selected are padding.
      has_heads: Whether there is an axis N. Static.
    """

    values: Float[AnyArray, "L B N S"]
    keys: TokenMap
    has_heads: bool = dataclasses.field(metadata={"static": True})

    def maps(self, row: int) -> dict[int, Float[np.ndarray, "*L rows columns"]]:
        """Return the attention of a row of the batch on its pictures.

        Args:
          row: The row of the batch.

        Returns:
          By the number of each tile within the row, float32[L, N, rows, columns] on the grid of its
          tokens or patches; NaN where the model reads none, or none was selected.

        Raises:
          ValueError: There is no such row, or the image tokens are not on a grid.
        """
        readers = self.keys.readers
        rows = np.eye(len(self.keys.kind), dtype=bool) if readers is None else np.asarray(readers)
        if not 0 <= row < len(rows):
            raise ValueError(f"row {row} of a batch of {len(rows)} rows")
        entries = np.flatnonzero(rows[row]).tolist()
        values = np.asarray(self.values)
        axis = values.ndim - (3 if self.has_heads else 2)
        maps: dict[int, np.ndarray] = {}
        for entry in entries:
            maps |= picture_maps(values.take(entry, axis), self.keys, entry)
        if not maps and (np.asarray(self.keys.kind)[entries] == CODE["image"]).any():
            raise ValueError(
                "the image tokens of this model are queries of a Q-Former and not on a grid: use "
                "qformer.cross.pattern for their attention to patches"
            )
        return maps

    @classmethod
    def join(
        cls, parts: Sequence[AttentionMap], real: Sequence[Bool[np.ndarray, " B"]], axis: int
    ) -> AttentionMap:
        """Return the maps of several batches as those of one.

        Args:
          parts: The maps of each batch.
          real: False for rows that only pad a batch.
          axis: The axis of the rows in `values`.

        Raises:
          ValueError: They are of the vision side, whose tiles belong to the rows of one batch.
        """
        if parts[0].keys.readers is not None:
            raise ValueError(
                "attention maps of the vision side are of the tiles of one batch and cannot be "
                "joined over batches: read lm.attn.pattern, or run batch by batch"
            )
        pairs = list(zip(parts, real, strict=True))
        values = [np.compress(rows, part.values, axis) for part, rows in pairs]
        keys = [jax.tree.map(lambda a, r=r: np.compress(r, a, 0), p.keys) for p, r in pairs]
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *keys)
        return cls(np.concatenate(values, axis), joined, parts[0].has_heads)

    def _repr_html_(self) -> str:
        return notebook_results.attention_map(self)


def read_attention(
    capture: BoundCapture, x: Float[Array, "B N T S"], lens: Callable | None
) -> Float[Array, "B N S"]:
    """Return the mean attention of the selected queries of each row to each key."""
    selected = jnp.asarray(capture.tokens).astype(jnp.float32)
    total = full_einsum("BNTS,BT->BNS", at_least_float32(x), selected)
    count = selected.sum(-1)
    # A tile without a selected token, or a row that only pads the batch, is 0.
    seen = total / jnp.maximum(count, 1)[:, None, None]
    seen = seen if capture.on is None else jnp.where(capture.on[:, None], seen, 0)
    return seen.mean(1) if capture.heads == "mean" else seen


def start_rollout(capture: BoundCapture) -> Float[Array, "B T T"]:
    """Return the rollout before the first layer: the identity."""
    B, T = capture.tokens.shape
    return jnp.broadcast_to(jnp.eye(T, dtype=jnp.float32), (B, T, T))


def roll_out(capture: BoundCapture, x: Float[Array, "B N T S"]) -> Float[Array, "B T S"]:
    """Return the rollout up to this layer from that up to the layer before."""
    pattern = at_least_float32(x).mean(1)
    step = pattern + jnp.eye(pattern.shape[-1], dtype=pattern.dtype)
    step = step / step.sum(-1, keepdims=True)
    return full_einsum("BTU,BUS->BTS", step, capture.state).astype(jnp.float32)


def read_rollout(
    capture: BoundCapture, x: Float[Array, "B N T S"], lens: Callable | None
) -> Float[Array, "B S"]:
    """Return the mean rollout from the selected queries of each row to each key."""
    return read_attention(capture, capture.state[:, None], lens)


def with_keys(capture: BoundCapture, values: Float[Array, ...]) -> AttentionMap:
    """Return the attention of all captured layers with its keys."""
    keys, on = capture.keys, capture.on
    assert keys is not None and on is not None, "an attention map has keys"
    kind = jnp.where(on, jnp.asarray(keys.kind), CODE["pad"]).astype(np.int8)
    return AttentionMap(values, dataclasses.replace(keys, kind=kind), capture.heads == "each")


def group_keys(capture: BoundCapture) -> Float[Array, "B S kinds"]:
    """Return the selected keys by kind or tile; one group without `by`."""
    assert capture.on is not None and capture.keys is not None, "a mass has keys"
    selected = jnp.asarray(capture.on)[..., None]
    if capture.by is not None:
        is_tile = all(name not in CODE for name in capture.by)
        codes = range(len(capture.by)) if is_tile else [CODE[name] for name in capture.by]
        of = capture.keys.tile if is_tile else capture.keys.kind
        selected = selected & (jnp.asarray(of)[..., None] == np.array(codes, np.int16))
    return selected.astype(jnp.float32)


def picture_maps(
    values: Float[AnyArray, "*L T"], tokens: TokenMap, row: int
) -> dict[int, Float[np.ndarray, "*L rows columns"]]:
    """Return values of the tokens of one row as maps over its pictures, by tile.

    Args:
      values: One value for each token of the row: attention on each key, an attribution, the
        entropy of a lens; with any axes before.
      tokens: The token map of the batch: `batch.tokens`, or that of another module.
      row: The row of the batch, or the tile of a module of tiles.

    Returns:
      For each tile, float[..., rows, columns] on the grid of its image tokens, NaN where the model
      reads none.

    Raises:
      ValueError: The number of values is not that of the tokens.
    """
    values = np.asarray(values)
    length = tokens.kind.shape[1]
    if values.shape[-1] != length:
        raise ValueError(
            f"values of {values.shape[-1]} tokens, but a row of the batch has {length}: give one "
            "value for each token, such as the keys of an attention"
        )
    kind, tile, down, across = (
        np.asarray(array)[row] for array in (tokens.kind, tokens.tile, tokens.row, tokens.column)
    )
    on_grid = (kind == CODE["image"]) & (down >= 0)
    maps = {}
    for number in np.unique(tile[on_grid]).tolist():
        of_tile = tile == number  # tokens that are not selected have a position as well
        own = np.flatnonzero(on_grid & of_tile)
        shape = down[of_tile].max() + 1, across[of_tile].max() + 1
        values_of_tile = np.full((*values.shape[:-1], *shape), np.nan, values.dtype)
        values_of_tile[..., down[own], across[own]] = values[..., own]
        maps[number] = values_of_tile
    return maps
