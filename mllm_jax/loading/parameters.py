"""Read tensors of a checkpoint into parameters, each part once and without further copies."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.stored import LazyTensor

_STRIP = 16  # rows of a transposed matrix that are copied at a time


def read(
    stored: Mapping[str, LazyTensor],
    slots: list[keys.Slot],
    shapes: Mapping[str, keys.Shape],
    dtype: np.dtype,
    places: Mapping[str, jax.sharding.Sharding] | None,
) -> dict[str, jax.Array]:
    """Return the parameters by path, each read onto its devices.

    Args:
      stored: The tensors of a checkpoint, by key.
      slots: The slot of each tensor; those of one parameter follow each other.
      shapes: The shapes of the parameters, by path.
      dtype: The dtype of the parameters.
      places: Their shardings, by path; None for one device.
    """
    arrays = {}
    for path, group in itertools.groupby(slots, lambda slot: slot.path):
        part = functools.partial(_read_part, stored, list(group), dtype)
        arrays[path] = put(part, shapes[path], None if places is None else places[path])
    return arrays


def put(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    shape: keys.Shape,
    place: jax.sharding.Sharding | None,
) -> jax.Array:
    """Return an array of which every part is read once, for all local devices that hold it."""
    if place is None:
        return jax.device_put(read(tuple(slice(0, n, 1) for n in shape)), may_alias=True)
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(n) for part, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(*ends) for ends in bounds))
        parts += [jax.device_put(part, device, may_alias=True) for device in devices]
        del part  # before the next one is read
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def _read_part(
    stored: Mapping[str, LazyTensor],
    slots: list[keys.Slot],
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Return the part of one parameter at an index, each layer at its position on the L axis."""
    array = _empty(tuple(part.stop - part.start for part in index), dtype)
    for slot in slots:
        place, at = (..., index) if slot.layer is None else (slot.layer, index[1:])
        _copy(array[place], slot.ours(stored[slot.key].read())[at])
    return array


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy and convert; a transposed matrix in strips, which stay in cache: four times as fast."""
    if source.dtype == target.dtype:  # NumPy moves its own types faster
        target, source = (array.view(f"u{array.itemsize}") for array in (target, source))
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[1], _STRIP):
        target[:, start : start + _STRIP] = source[:, start : start + _STRIP]


def _empty(shape: keys.Shape, dtype: np.dtype) -> np.ndarray:
    """Return an array that JAX takes over on CPU without a copy: it starts at 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
