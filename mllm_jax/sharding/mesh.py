"""Create a mesh of devices, and shard the arrays of a forward pass over it.

The arrays of a model carry their sharding, so a pass finds its mesh there. At its start a pass
enters that mesh (`use_mesh_of`) and shards its inputs (`shard_batch`); inside, the tensor of a site
is sharded by its axis letters (`constrain`). Without a mesh these functions do nothing.
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

_MAX_FETCH_BYTES = 2**26  # of an array that a process fetches from others at one time
AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")
# The mesh axes over which axes of activations are sharded; `rules` has those of parameters.
MESH_AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("BI", BATCH_AXES),
    "R": ("data",),
    **dict.fromkeys("NKFV", ("model",)),
}


def mesh(
    data: int | None = None,
    model: int = 1,
    *,
    fsdp: int = 1,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """Create a mesh of `data` x `fsdp` x `model` devices, for `load`.

    Args:
      data: The number of shards of a batch with a copy of the model each (data parallelism); by
        default the largest number for which there are devices.
      model: The number of shards of each layer (tensor parallelism).
      fsdp: The number of further shards of a batch that share one copy of the model and gather
        each layer in turn (fully sharded data parallelism).
      devices: The devices; by default those of all processes.

    Returns:
      A mesh with the axes "data", "fsdp" and "model", of type Auto: the compiler moves the data.

    Raises:
      ValueError: There are too few devices, or they belong to several slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data is None:
        data = max(1, len(devices) // max(1, model * fsdp))
    call = f"mesh(data={data}, model={model}, fsdp={fsdp})"
    if min(data, model, fsdp) < 1:
        raise ValueError(f"{call}: each must be 1 or more")
    size = data * model * fsdp
    if size > len(devices):
        raise ValueError(
            f"{call} needs {size} devices, there are only {len(devices)}; make it smaller"
        )
    if len({getattr(device, "slice_index", None) for device in devices[:size]}) > 1:
        raise ValueError(f"{call}: its devices are of several slices; use those of one slice")
    # An axis of the mesh may span parts of axes of the slice: 32 x 2 fits on 8 x 8.
    placed = mesh_utils.create_device_mesh(
        (data, fsdp, model), devices[:size], allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(tree: Any) -> jax.sharding.Mesh | jax.sharding.AbstractMesh | None:
    """Return the mesh of some arrays, abstract while they are traced; None on one device."""
    for leaf in jax.tree.leaves(tree):
        traced = isinstance(leaf, jax.core.Tracer)
        sharding = getattr(jax.typeof(leaf) if traced else leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
            return sharding.mesh
    return None


def use_mesh_of(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the mesh of some arrays is active; without a mesh it is empty."""
    mesh = mesh_of(tree)
    if mesh is None:
        return contextlib.nullcontext()
    if _active_mesh() is None or not isinstance(mesh, jax.sharding.Mesh):
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return jax.set_mesh(mesh)


def _active_mesh() -> jax.sharding.Mesh | None:
    """Return the active mesh with its devices; None inside of a trace."""
    try:
        return jax.sharding.get_mesh()
    except ValueError:
        return None


def is_active() -> bool:
    """Return whether a mesh is active."""
    return jax.sharding.get_abstract_mesh().axis_names == AXES


def is_split() -> bool:
    """Return whether a mesh of several devices is active."""
    return is_active() and jax.sharding.get_abstract_mesh().size > 1


def axes_for(letter: str | None, size: int) -> tuple[str, ...] | None:
    """Return the axes of the active mesh that split an axis of this letter and size, or None."""
    active = jax.sharding.get_abstract_mesh()
    if not is_active():
        return None
    axes = tuple(axis for axis in MESH_AXES.get(letter or "", ()) if active.shape[axis] > 1)
    # Inside of a `shard_map` over an axis, arrays are already the part of one device.
    free = all(
        AxisType.Auto == t for a, t in zip(active.axis_names, active.axis_types) if a in axes
    )
    divides = size % _size(axes) == 0
    return axes if axes and free and divides else None


def shard_count(letter: str, size: int | None = None) -> int:
    """Return the number of parts into which the mesh splits an axis of this letter.

    Args:
      letter: The axis letter.
      size: The length of the axis; if None, a length that the mesh divides is assumed.
    """
    if size is None:
        return _size(MESH_AXES[letter]) if is_active() else 1
    return _size(axes_for(letter, size) or ())


def round_up_to_shards(letter: str, size: int) -> int:
    """Return the smallest multiple of `shard_count(letter)` that is at least `size`."""
    return -(-size // shard_count(letter)) * shard_count(letter)


def _size(axes: Sequence[str]) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)


def partition_spec(letters: Sequence[str | None], shape: Sequence[int]) -> P:
    """Return the PartitionSpec of a tensor from its axis letters."""
    return P(*(axes_for(letter, n) for letter, n in zip(letters, shape, strict=True)))


def constrain(x: jax.Array, letters: Sequence[str | None]) -> jax.Array:
    """Shard a traced array by its axis letters; return it unchanged without a mesh."""
    if not is_active():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(letters, x.shape))


def map_lanes(fn: Callable[..., Any], lanes: Any, *shared: Any) -> Any:
    """Compute fn(lanes, *shared) with the lanes split over the data axis and all else replicated.

    Args:
      fn: The function; its results have a leading axis R.
      lanes: A pytree of arrays with a leading axis R; None if every shard computes the same.
      *shared: Pytrees of arrays.
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
    """Shard an array of the host by its axis letters; return it unchanged without a mesh.

    All processes hold the array, and each copies the parts of its own devices.
    """
    active = _active_mesh()
    if active is None or active.empty or isinstance(x, jax.core.Tracer):
        return x
    sharding = NamedSharding(active, partition_spec(letters, np.shape(x)))
    if isinstance(x, jax.Array) and mesh_of(x) is not None:
        return jax.device_put(x, sharding)
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicate(tree: Any) -> Any:
    """Replicate the arrays of a pytree that are not on the active mesh."""
    return jax.tree.map(lambda x: x if mesh_of(x) else shard(x, (None,) * np.ndim(x)), tree)


def shardings_of(tree: Any) -> Any:
    """Return the shardings of a pytree of arrays; None without a mesh."""
    return jax.tree.map(lambda x: x.sharding, tree) if is_active() else None


def shard_batch(batch: Any) -> Any:
    """Shard the rows of a batch and their tiles over the mesh.

    A single row is replicated, and so are images that rows share.

    Raises:
      ValueError: The mesh does not divide the rows.
    """
    if not is_active() or _active_mesh() is None:
        return batch
    rows, parts = len(batch.ids), shard_count("B")
    if rows > 1 and rows % parts:
        raise ValueError(
            f"a batch of {rows} rows does not divide over the {parts} shards of the mesh: give it "
            f"a multiple of {parts} rows, or one"
        )

    def shard_rows(x):
        by_row = rows > 1 and len(x) and len(x) % rows == 0
        return shard(x, ("B" if by_row else None, *(None,) * (np.ndim(x) - 1)))

    return jax.tree.map(shard_rows, batch)


def gather_to_host(tree: Any) -> Any:
    """Copy arrays that are partly on other processes to the host; leave others unchanged."""
    remote = [leaf for leaf in jax.tree.leaves(tree) if _is_remote(leaf)]
    if not remote:
        return tree
    return jax.tree.map(np.asarray, _reshard(tree, _replicated(remote)))


def _replicated(tree: Any) -> NamedSharding:
    mesh = mesh_of(tree)
    assert mesh is not None, "arrays of several processes are on a mesh"
    return NamedSharding(mesh, P())


def _is_remote(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return False
    return not leaf.is_fully_addressable


@functools.partial(jax.jit, static_argnames="place")
def _reshard(tree: Any, place: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(tree, place)


def iterate_rows(x: Any) -> Iterator[np.ndarray]:
    """Yield an array on the host in order, a few rows at a time if it is remote."""
    if not _is_remote(x) or x.is_fully_replicated:
        yield np.asarray(x)
        return
    place = _replicated(x)
    step = max(1, _MAX_FETCH_BYTES * len(x) // x.nbytes)
    for start in range(0, len(x), step):
        yield np.asarray(_fetch_rows(x, start, min(step, len(x) - start), place))


def to_numpy(x: Any) -> np.ndarray:
    """Return a complete array on the host."""
    parts = list(iterate_rows(x))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("count", "place"))
def _fetch_rows(x: jax.Array, start: int, count: int, place: NamedSharding) -> jax.Array:
    return _reshard(jax.lax.dynamic_slice_in_dim(x, start, count), place)
