"""The key-value cache of a language model, a plain pytree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mllm_jax.sharding import mesh
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values by layer. A slot is an index in the cache; a position is one in the row.

    Attributes:
      key: The keys, float[L, B, K, S, H], heads first, as attention reads them.
      value: The values, float[L, B, K, S, H].
      position: The position of each token in its row, int32[B, S].
      valid: False for padding and for slots that are not written yet, bool[B, S].
    """

    key: Float[Array, "L B K S H"]
    value: Float[Array, "L B K S H"]
    position: Int[AnyArray, "B S"]
    valid: Bool[AnyArray, "B S"]

    @staticmethod
    def bytes_on_device(config: Any, rows: int, slots: int, dtype: DTypeLike) -> int:
        """Return the bytes of keys and values on one device of the active mesh.

        Args:
          config: The config of the language model.
          rows: The number of rows B.
          slots: The number of slots S.
          dtype: The dtype of the keys and values.
        """
        shards = mesh.shard_count("B", rows) * mesh.shard_count("K", config.kv_heads)
        numbers = 2 * config.layers * rows * config.kv_heads * slots * config.head_width
        return numbers * jnp.dtype(dtype).itemsize // shards

    def extended(self, slots: int) -> Cache:
        """Return the cache with `slots` empty slots at the end."""

        def wider(a, axis):
            return jnp.pad(a, [(0, slots if i == axis else 0) for i in range(a.ndim)])

        return Cache(
            wider(self.key, 3), wider(self.value, 3), wider(self.position, 1), wider(self.valid, 1)
        )

    def first(self, slots: int) -> Cache:
        """Return the first `slots` slots."""
        return Cache(
            self.key[..., :slots, :], self.value[..., :slots, :],
            self.position[:, :slots], self.valid[:, :slots],
        )  # fmt: skip

    def write(self, new: Cache, slot: Int[Array, ""]) -> Cache:
        """Return the cache with the slots of `new` written from `slot` on."""

        def at(old, fresh, axis):
            return jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), slot, axis)

        return Cache(
            at(self.key, new.key, 3),
            at(self.value, new.value, 3),
            at(self.position, new.position, 1),
            at(self.valid, new.valid, 1),
        )
