"""Place a program on a mesh: the mesh of a topology, the sharding and the bytes of each array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import families
from mllm_jax.models.cache import Cache
from mllm_jax.passes import generate, run
from mllm_jax.planning import compilation
from mllm_jax.planning.chips import Chip, Slice
from mllm_jax.planning.programs import Program, Size
from mllm_jax.sharding import memory, rules
from mllm_jax.sharding import mesh as mesh_
from mllm_jax.training import parts


def topology_mesh(
    topology: str, network, study: str, data: int | None, fsdp: int, compile: bool
) -> Mesh | AbstractMesh:
    """Return the mesh of a topology; an abstract one if nothing is compiled.

    Args:
      topology: The name of a slice.
      network: The network, as shapes.
      study: The name of the study.
      data: The number of data shards; None for the default.
      fsdp: The size of the `fsdp` axis.
      compile: Whether a program is to be compiled for the mesh.

    Raises:
      ValueError: The topology is unknown, the mesh does not divide its chips, or the compiler for
        GPUs is not installed.
    """
    slice_ = Slice.parse(topology)
    if data is None:
        data = _default_data_shards(slice_, network, study, fsdp)
    if slice_.chips % (data * fsdp):
        raise ValueError(
            f"data={data} x fsdp={fsdp} does not divide the {slice_.chips} chips of {topology}"
        )
    model = slice_.chips // (data * fsdp)
    if not (compile and compilation.has_compiler(slice_)):
        shape = data, fsdp, model
        return AbstractMesh(shape, mesh_.AXES, axis_types=(AxisType.Auto,) * len(shape))
    return mesh_.mesh(data, model, fsdp=fsdp, devices=compilation.topology_devices(slice_))


def _default_data_shards(slice_: Slice, network, study: str, fsdp: int) -> int:
    """Return the largest number of data shards for which weights take a quarter of a chip."""
    weights = bytes_per_chip(network)
    if study == "e2e":  # float32 parameters, two moments and gradients, besides the cast copy
        weights += 16 * parts.size(network)
    heads, chips = network.config.lm.kv_heads, slice_.chips // fsdp
    fitting = [
        model for model in range(1, chips + 1)
        if chips % model == 0 and heads % model == 0
        and weights <= slice_.chip.memory / 4 * model * fsdp
    ]  # fmt: skip
    return chips // fitting[0] if fitting else max(1, chips // heads)


def total_size(size: Size, mesh, study: str) -> Size:
    """Return the size over all data shards; a sweep shards its lanes and replicates its rows."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        rows, lanes = mesh_.shard_count("B"), mesh_.shard_count("R")
    rows = size.rows if study == "sweep" else size.rows * rows
    return dataclasses.replace(size, rows=rows, lanes=size.lanes * lanes)


def place_program(program: Program, network, mesh, lanes: bool) -> Program:
    """Return the program with the sharding of each array.

    Args:
      program: The program.
      network: The network, as shapes.
      mesh: The mesh.
      lanes: Whether the edits are the lanes of a sweep.
    """
    table = families.of(network.config).sharding_rules(network.config)
    weights = rules.specs(network.config, table, parameter_shapes(network), mesh)
    how: dict[str, Callable[[str, Any], P]] = {
        kind: lambda path, leaf: _parameter_spec(path, weights)
        for kind in ("weights", "frozen", "optimiser")
    }
    if lanes:
        how["edits"] = lambda path, leaf: _leading_spec("R", leaf)
    else:
        how["batch"] = lambda path, leaf: _leading_spec("B", leaf)

    def lying(leaf, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def put(array, letters) -> jax.ShapeDtypeStruct:
        return lying(array, mesh_.partition_spec(letters, array.shape))

    def place(kind: str, tree: Any) -> tuple[str, Any]:
        if kind == "edits" and not lanes:
            return kind, run.shard_edits(tree, put)

        def one(path, leaf):
            if not hasattr(leaf, "shape"):
                return leaf
            return lying(leaf, how[kind](parts.weight_name(path), leaf) if kind in how else P())

        return kind, jax.tree_util.tree_map_with_path(one, tree)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return dataclasses.replace(
            program,
            args=tuple(place(*arg) for arg in program.args),
            kept=tuple(place(*kept) for kept in program.kept),
        )


def place_layers(program: Program, mesh, chip: Chip, size: Size, slots: int) -> Program:
    """Return the program of `generate` with the layers stacked or separate, as on a chip.

    Args:
      program: The program, placed on a mesh.
      mesh: The mesh.
      chip: The kind of chip.
      size: The sizes of its inputs.
      slots: The number of slots of the cache.
    """
    model = dict(program.args)["weights"]
    weights, dtype = bytes_per_chip(model), jax.tree.leaves(model)[0].dtype
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        cache = Cache.bytes_on_device(model.config.lm, size.rows, slots, dtype)
    separate = generate.separates_layers(
        chip.platform, size.rows, size.steps, bytes_per_chip(model.lm), cache,
        max(0, chip.memory - weights),
    )  # fmt: skip
    return dataclasses.replace(program, static=program.static | {"separate_layers": separate})


def _leading_spec(letter: str, leaf) -> P:
    """Return the PartitionSpec of an array whose leading axis has this letter."""
    return (
        mesh_.partition_spec((letter, *(None,) * (len(leaf.shape) - 1)), leaf.shape)
        if leaf.shape
        else P()
    )


def _parameter_spec(path: str, weights: Mapping[str, P]) -> P:
    """Return the spec of a parameter or of its optimiser state; other arrays are replicated."""
    found = [name for name in weights if f".{path}".endswith(f".{name}")]
    return weights[max(found, key=len)] if found else P()


def parameter_shapes(network) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, by dotted path."""
    leaves = jax.tree_util.tree_flatten_with_path(network)[0]
    return {parts.weight_name(path): leaf.shape for path, leaf in leaves}


def bytes_per_chip(tree: Any) -> int:
    """Return the bytes that a chip holds of a pytree of shapes."""
    shapes = [a for a in jax.tree.leaves(tree) if isinstance(a, jax.ShapeDtypeStruct)]
    return memory.bytes_on_device(shapes)
