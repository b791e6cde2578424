"""The memory of the devices that hold a model."""

from __future__ import annotations

import math
from typing import Any

import jax


def bytes_on_device(tree: Any) -> int:
    """Return the bytes of a pytree of arrays, or of their shapes, on one of its devices."""

    def size(leaf) -> int:
        sharding = getattr(leaf, "sharding", None)  # which NumPy's arrays lack
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def free_bytes(model: Any) -> int | None:
    """Return the bytes of a device's memory that a model leaves free.

    It depends only on values that are equal in all processes: the memory of a device and the model.

    Returns:
      The bytes, at least 0; None if the device does not report its memory, as a CPU.
    """
    stats = first_device(model).memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return max(0, stats["bytes_limit"] - bytes_on_device(model))


def first_device(model: Any) -> Any:
    """Return the device of this process with the lowest id that holds a part of a model.

    A model of NumPy arrays will be on the default device.
    """
    arrays = (leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array))
    leaf = next(arrays, None)
    devices: set[Any] = leaf.sharding.addressable_devices if leaf is not None else set()
    return min(devices or jax.local_devices()[:1], key=lambda device: device.id)
