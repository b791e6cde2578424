"""The memory of the devices that hold a model."""

from __future__ import annotations

import math
from typing import Any

import jax


def bytes_on_device(tree: Any) -> int:
    """Return the bytes of a pytree of arrays on one of the devices that hold it."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in leaves)
    return sum(math.prod(shape) * itemsize for shape, itemsize in shapes)


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
    """Return the device of this process with the lowest id that holds a part of a model."""
    leaf = next(leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array))
    devices: set[Any] = leaf.sharding.addressable_devices
    return min(devices, key=lambda device: device.id)
