"""A mesh of devices, and what of a forward pass lies where on it.

A model's arrays carry their sharding, so a pass knows its mesh from them. Where it starts it
enters that mesh (`on`) and spreads what it reads (`place`); inside, the tensor of a site lies as
its axis letters say (`constrain`). Without a mesh none of these does anything.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

_MAX_FETCH_BYTES = 2**26  # bytes that a process fetches from others at one time
AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")
# What axes of activations are split over; of parameters, `rules` says it.
MESH_AXES = dict.fromkeys("BI", BATCH_AXES) | {"R": ("data",)} | dict.fromkeys("NKFV", ("model",))


def mesh(
    data: int | None = None,
    model: int = 1,
    *,
    fsdp: int = 1,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """A mesh for `load`, of `data` x `fsdp` x `model` devices.

    Args:
        data: parts of a batch, each with all of the model; by default as many as there are devices
            for.
        model: parts of every layer (tensor parallelism).
        fsdp: further parts of a batch, which share one copy of the model and gather a layer when
            it is its turn (fully sharded data parallelism).
        devices: by default all, of all processes.

    Returns:
        A mesh with the axes "data", "fsdp" and "model", of type Auto: the compiler moves the data.

    Raises:
        ValueError: there are not that many devices, or they are of several slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data is None:
        data = max(1, len(devices) // max(1, model * fsdp))
    asked = f"mesh(data={data}, model={model}, fsdp={fsdp})"
    if min(data, model, fsdp) < 1:
        raise ValueError(f"{asked}: each is 1 or more")
    size = data * model * fsdp
    if size > len(devices):
        raise ValueError(f"{asked} needs {size} devices, there are {len(devices)}; make it smaller")
    if len({getattr(device, "slice_index", None) for device in devices[:size]}) > 1:
        raise ValueError(f"{asked}: its devices are of several slices; give it those of one")
    # A mesh need not be made of whole axes of the slice: 32 x 2 lies on 8 x 8 as well.
    placed = mesh_utils.create_device_mesh(
        (data, fsdp, model), devices[:size], allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(tree: Any) -> jax.sharding.Mesh | jax.sharding.AbstractMesh | None:
    """The mesh that arrays lie on, abstract while they are traced; None for one device."""
    for leaf in jax.tree.leaves(tree):
        traced = isinstance(leaf, jax.core.Tracer)
        sharding = getattr(jax.typeof(leaf) if traced else leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
            return sharding.mesh
    return None


def use_mesh_of(tree: Any) -> contextlib.AbstractContextManager:
    """To be on the mesh of some arrays, if they are on one: what is traced inside is for it."""
    found = mesh_of(tree)
    if found is None:
        return contextlib.nullcontext()
    if _active_mesh() is None:
        return jax.sharding.use_abstract_mesh(found.abstract_mesh)
    return jax.set_mesh(found)


def _active_mesh() -> jax.sharding.Mesh | None:
    """The mesh we are on, with its devices; None while something is traced."""
    try:
        return jax.sharding.get_mesh()
    except ValueError:
        return None


def is_active() -> bool:
    """Whether what is traced here is for a mesh."""
    return jax.sharding.get_abstract_mesh().axis_names == AXES


def axes_for(letter: str | None, size: int) -> tuple[str, ...] | None:
    """The mesh axes that an axis of this letter and size is split over, where we are now."""
    here = jax.sharding.get_abstract_mesh()
    if not is_active():
        return None
    axes = tuple(axis for axis in MESH_AXES.get(letter, ()) if here.shape[axis] > 1)
    # Inside of a `shard_map` an axis is taken: each device sees its own part alone.
    free = all(AxisType.Auto == t for a, t in zip(here.axis_names, here.axis_types) if a in axes)
    divides = size % _size(axes) == 0
    return axes if axes and free and divides else None


def shard_count(letter: str, size: int | None = None) -> int:
    """Return the number of parts into which the mesh splits an axis of this letter.

    Args:
        letter: the axis letter.
        size: the length of the axis; if None, a length that the mesh divides is assumed.
    """
    if size is None:
        return _size(MESH_AXES[letter]) if is_active() else 1
    return _size(axes_for(letter, size) or ())


def round_up_to_shards(letter: str, size: int) -> int:
    """The size up to which an axis of this letter is filled, so that the mesh divides it."""
    return -(-size // shard_count(letter)) * shard_count(letter)


def _size(axes: Sequence[str]) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)


def partition_spec(letters: Sequence[str | None], shape: Sequence[int]) -> P:
    """The PartitionSpec of a tensor, from its axis letters."""
    return P(*(axes_for(letter, n) for letter, n in zip(letters, shape, strict=True)))


def constrain(x: jax.Array, letters: Sequence[str | None]) -> jax.Array:
    """x, split as its axis letters say; x itself where there is no mesh."""
    if not is_active():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(letters, x.shape))


def map_lanes(fn: Callable, lanes: Any, *shared: Any) -> Any:
    """fn(lanes, *shared), with the lanes over the data axis, whose every part has all rows.

    Args:
        fn: the function of one part of the lanes.
        lanes: arrays that lead with R, as those that come out; None where each part does the same.
        shared: trees of arrays.
    """
    leaves = jax.tree.leaves(lanes)
    if shard_count("R") == 1 or (leaves and axes_for("R", len(leaves[0])) is None):
        return fn(lanes, *shared)
    own = P("data") if leaves else P()
    return jax.shard_map(
        fn, in_specs=(own, *(P() for _ in shared)), out_specs=own, axis_names={"data"},
        check_vma=False,
    )(lanes, *shared)  # fmt: skip


def shard(x: Any, letters: Sequence[str | None]) -> Any:
    """An array of the host, split as its axis letters say; x itself where there is no mesh.

    Each process puts its own parts of what all of them have.
    """
    here = _active_mesh()
    if here is None or here.empty or isinstance(x, jax.core.Tracer):
        return x
    sharding = NamedSharding(here, partition_spec(letters, np.shape(x)))
    if isinstance(x, jax.Array) and mesh_of(x) is not None:
        return jax.device_put(x, sharding)
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicate(tree: Any) -> Any:
    """The same on the mesh: arrays that are not on it come to be whole in every place."""
    return jax.tree.map(lambda x: x if mesh_of(x) else shard(x, (None,) * np.ndim(x)), tree)


def shardings_of(tree: Any) -> Any:
    """Where arrays lie, for what shall lie there after them; None where there is no mesh."""
    return jax.tree.map(lambda x: x.sharding, tree) if is_active() else None


def shard_batch(batch: Any) -> Any:
    """A batch with its rows, and the tiles of each, spread over the mesh.

    One row alone is read everywhere, and so are pictures that rows share.

    Raises:
        ValueError: the rows do not divide.
    """
    if not is_active() or _active_mesh() is None:
        return batch
    rows, parts = len(batch.ids), shard_count("B")
    if rows > 1 and rows % parts:
        raise ValueError(
            f"a batch of {rows} rows does not divide over the {parts} parts that the mesh makes "
            f"of it: give it a multiple of {parts} rows, or one"
        )

    def spread(x):
        apart = rows > 1 and len(x) and len(x) % rows == 0
        return shard(x, ("B" if apart else None, *(None,) * (np.ndim(x) - 1)))

    return jax.tree.map(spread, batch)


def gather_to_host(tree: Any) -> Any:
    """The same; arrays of which other processes hold parts come to the host, whole."""
    far = [leaf for leaf in jax.tree.leaves(tree) if _is_remote(leaf)]
    if not far:
        return tree
    return jax.tree.map(np.asarray, _reshard(tree, NamedSharding(mesh_of(far), P())))


def _is_remote(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return False
    return not leaf.is_fully_addressable


@functools.partial(jax.jit, static_argnames="place")
def _reshard(tree: Any, place: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(tree, place)


def iterate_rows(x: Any) -> Iterator[np.ndarray]:
    """An array as the host reads it, in order; what other processes hold comes some rows a time."""
    if not _is_remote(x) or x.is_fully_replicated:
        yield np.asarray(x)
        return
    place = NamedSharding(mesh_of(x), P())
    step = max(1, _MAX_FETCH_BYTES * len(x) // x.nbytes)
    for start in range(0, len(x), step):
        yield np.asarray(_fetch_rows(x, start, min(step, len(x) - start), place))


def to_numpy(x: Any) -> np.ndarray:
    """An array on the host, whole."""
    parts = list(iterate_rows(x))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("count", "place"))
def _fetch_rows(x: jax.Array, start: int, count: int, place: NamedSharding) -> jax.Array:
    return _reshard(jax.lax.dynamic_slice_in_dim(x, start, count), place)
