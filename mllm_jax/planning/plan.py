"""Plans: what a study takes on a topology, without weights and without hardware.

The program of the study is compiled for the topology by the compiler itself, which comes with the
package `libtpu` and needs no TPU: memory is its own analysis, work and traffic are read from its
text. Where it is absent a plan is made from shapes alone, and says so.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import families
from mllm_jax.batch import Batch
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.passes import run
from mllm_jax.planning import hlo, programs, work
from mllm_jax.planning.chips import GIB, Chip, Slice
from mllm_jax.planning.programs import Program, Size
from mllm_jax.report import tables
from mllm_jax.sharding import mesh as mesh_
from mllm_jax.sharding import rules
from mllm_jax.training import parts

COMPILED, SHAPES = "compiled", "shapes"
SMALL = 2**16  # bytes: an array below is a statistic or an index, whatever its shape
TRIES = 4  # compilations in the search for the largest number that fits
USABLE = 0.98  # of a chip's memory: the rest is the system's
STAY = {"activation", "vocabulary", "stack"}  # what no chip should ever gather
IN_USE = {"layer", "weights"}  # what is gathered in its turn where chips share one copy
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study takes of each chip.

    Attributes:
      study, topology: what was planned, and for which slice.
      data, fsdp, model: the mesh.
      rows, tokens: B over all data shards, and T. lanes: of a sweep, over all data shards.
      how: "compiled" by the compiler for that topology, or "shapes" where there is none.
      bytes: of a chip's memory by what lies in it.
      capacity: bytes of a chip's memory; None where it is not known.
      fits: None where it is not known.
      flops: of matrix products. ideal: what they were if all chips had their share and no more.
      moved: bytes from and to main memory; None without a compiler.
      collectives: what chips exchange: kind, of what, array, group, times, bytes received.
      seconds: lower bounds of a run by what would limit it, at the chip's published peaks.
    """

    study: str
    topology: str
    data: int
    fsdp: int
    model: int
    rows: int
    tokens: int
    lanes: int
    how: str
    bytes: dict[str, int]
    capacity: int | None
    fits: bool | None
    flops: float
    ideal: float
    moved: float | None
    collectives: tuple[dict[str, Any], ...]
    seconds: dict[str, float]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def limit(self) -> str | None:
        """What limits a run from below: compute, memory or links."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    @property
    def received(self) -> float:
        """Bytes that a chip receives from others in a run."""
        return sum(c["received"] * c["times"] for c in self.collectives)

    @property
    def mesh(self) -> str:
        """data x fsdp x model."""
        return f"{self.data} x {self.fsdp} x {self.model}"

    def gathers(self) -> list[dict[str, Any]]:
        """Gathers of what should stay where it is: under `fsdp` all but the layer in use."""
        stay = STAY if self.fsdp > 1 else STAY | IN_USE
        return [c for c in self.collectives if c["kind"] == "all-gather" and c["of"] in stay]

    def json(self) -> dict[str, Any]:
        """As plain values."""
        more = {"total": self.total, "limit": self.limit, "received": self.received}
        return dataclasses.asdict(self) | more

    def table(self) -> str:
        """As Markdown."""
        lanes = f", {self.lanes} lanes" if self.lanes else ""
        head = (
            f"{self.study} on {self.topology}, mesh {self.mesh}: "
            f"{self.rows} rows of {self.tokens} tokens{lanes}"
        )
        if self.how == SHAPES:
            head += "\nFrom shapes alone: no compiler was asked for activations and traffic."
        verdict = {True: "fits", False: "does not fit", None: "fits or not: not known"}[self.fits]
        rows = [(name, format_bytes(count)) for name, count in self.bytes.items() if count]
        rows.append(
            ("in all", f"{format_bytes(self.total)} of {format_bytes(self.capacity)}: {verdict}")
        )
        rows.append(("matrix products", f"{self.flops / 1e12:.3g} Tflop"))
        if self.moved is not None:
            rows += [
                ("bytes moved", format_bytes(self.moved)),
                ("bytes received", format_bytes(self.received)),
            ]
        rows += [(f"at least, by {name}", format_seconds(s)) for name, s in self.seconds.items()]
        parts = [head, tables.markdown(("a chip", ""), rows)]
        columns = ("collective", "of", "array", "chips", "times", "received")
        exchanged = [
            (c["kind"], c["of"], c["array"], c["group"], c["times"],
             format_bytes(c["received"] * c["times"]))
            for c in self.collectives
        ]  # fmt: skip
        return "\n\n".join([*parts, tables.markdown(columns, exchanged)] if exchanged else parts)


def plan(
    model: MultimodalModel | MultimodalConfig,
    batch: Size | Batch | None = None,
    edits: Edits | None = None,
    captures: dict[str, Capture] | None = None,
    *,
    topology: str | Mesh = "v5e:2x4",
    study: str = "run",
    data: int | None = None,
    fsdp: int = 1,
    dtype: Any = jnp.bfloat16,
    compile: bool = True,
) -> Plan:
    """What a study takes on a topology, without weights and without hardware.

    Args:
      model: a network or its config; weights are not read.
      batch: rows and lanes of a data shard; or a batch, of all of them.
      edits, captures: of each pass, beside those of the study.
      topology: "v5e:2x4", see `chips`; or a mesh of devices that are there.
      study: of `programs.STUDIES`; several captures as "counts+lens".
      data, fsdp: of the mesh, see `mj.mesh`; the other chips share each layer. By default as many
        data shards as leave three quarters of a chip to other things than weights.
      dtype: of the weights.
      compile: for the topology, if its compiler is there; else shapes alone tell what they can.

    Raises:
      ValueError: there is no such topology or study, or the mesh does not divide its chips.
    """
    config = getattr(model, "config", model)
    network = programs.abstract_model(config, dtype)
    mesh = (
        topology
        if isinstance(topology, Mesh)
        else _mesh(topology, network, study, data, fsdp, compile)
    )
    asked = _over(batch if isinstance(batch, Size) else Size(), mesh, study)
    if isinstance(batch, Batch):
        asked = dataclasses.replace(asked, rows=len(batch.ids))
    else:
        batch = programs.abstract_batch(config, asked)
    program = programs.build(study, network, batch.replace(processor=None), edits, captures, asked)
    program = _placed(program, network, mesh, lanes=study == "sweep")
    args = [tree for _, tree in program.args]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        flops = work.flops(program.fn, *args, unknown=program.unknown, **program.static)
    named = isinstance(topology, str)
    found = _compile(_lower(program, mesh)) if compile and isinstance(mesh, Mesh) else None
    return Plan(
        study=study,
        topology=topology if named else f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        data=mesh.shape["data"],
        fsdp=mesh.shape["fsdp"],
        model=mesh.shape["model"],
        rows=asked.rows,
        tokens=batch.ids.shape[1],
        lanes=asked.lanes if study == "sweep" else 0,
        ideal=flops / mesh.size,
        **_findings(
            program, found, flops / mesh.size, Slice.parse(topology).chip if named else None,
            _subjects(network, mesh),
        ),
    )  # fmt: skip


def summary(found: Sequence[Plan]) -> str:
    """A line for each plan, as Markdown."""
    columns = (
        "topology", "study", "--mesh=", "rows x tokens", "memory of a chip", "fits", "Tflop",
        "moved", "received", "at least", "limited by", "how",
    )  # fmt: skip
    verdict = {True: "yes", False: "no", None: "not known"}
    return tables.markdown(
        columns,
        [
            (
                p.topology, p.study, f"data={p.data},fsdp={p.fsdp},model={p.model}",
                f"{p.rows} x {p.tokens}" + (f", {p.lanes} lanes" if p.lanes else ""),
                format_bytes(p.total), verdict[p.fits], f"{p.flops / 1e12:.3g}",
                format_bytes(p.moved),
                format_bytes(p.received) if p.how == COMPILED and p.moved is not None else "?",
                format_seconds(max(p.seconds.values(), default=0)), p.limit, p.how,
            )
            for p in found
        ],
    )  # fmt: skip


def smallest_topology(
    model, batch: Size | None = None, *, topology: str, **how: Any
) -> Plan | None:
    """The plan on the smallest slice that fits, of those at least as large as this one.

    Args:
      topology: where to begin. model, batch, how: as `plan` has them.

    Returns:
      None where no slice fits. Without a compiler the first that is not known to be too small.
    """
    for slice_ in Slice.parse(topology).larger():
        found = plan(model, batch, topology=str(slice_), **how)
        if found.fits is not False:
            return found
    return None


def largest_that_fits(field: str, model, batch: Size | None = None, **how: Any) -> tuple[int, Plan]:
    """The largest number of rows or lanes of a data shard that fits.

    Memory is taken to grow in a line, through a compiled plan of the number given and one of twice
    as many. What the line promises is compiled; if it does not fit, the line goes on from there.

    Args:
      field: "rows" or "lanes". model, batch, how: as `plan` has them.

    Returns:
      The number and its plan. A larger one may fit where memory grows in steps.

    Raises:
      ValueError: the number given does not fit, or there is no compiler.
    """
    batch = batch or Size()

    def at(number: int) -> Plan:
        return plan(model, dataclasses.replace(batch, **{field: number}), **how)

    few = getattr(batch, field)
    best, next_ = at(few), at(2 * few)
    if not best.fits:
        reason = "there is no compiler" if best.fits is None else f"{few} {field} do not fit"
        raise ValueError(f"the largest {field}: {reason}")
    failed = None
    for _ in range(TRIES):
        number = _shard(next_, field)
        slope = (next_.total - best.total) / (number - few)
        if next_.fits:
            best, few = next_, number
        else:
            failed = number
        most = few + int((best.capacity * USABLE - best.total) / max(slope, 1))
        most = most if failed is None else min(most, failed - 1)
        if most <= few:
            break
        next_ = at(most)
    return few, best


def _shard(found: Plan, field: str) -> int:
    """Rows or lanes of a data shard."""
    if found.study == "sweep":
        return found.rows if field == "rows" else found.lanes // found.data
    return getattr(found, field) // (found.data * found.fsdp)


def has_tpu_compiler() -> bool:
    """Whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def topology_devices(slice_: Slice) -> list[Any]:
    """The chips of a slice, to compile for; none of them is there."""
    # The library would ask the metadata server of a cloud machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=str(slice_)).devices


def _mesh(
    topology: str, network, study: str, data: int | None, fsdp: int, compile: bool
) -> Mesh | AbstractMesh:
    """The mesh of a topology; an abstract one where nothing is compiled."""
    slice_ = Slice.parse(topology)
    if data is None:
        data = _data(slice_, network, study, fsdp)
    if slice_.chips % (data * fsdp):
        raise ValueError(
            f"data={data} x fsdp={fsdp} does not divide the {slice_.chips} chips of {topology}"
        )
    model = slice_.chips // (data * fsdp)
    if not (compile and has_tpu_compiler()):
        shape = data, fsdp, model
        return AbstractMesh(shape, mesh_.AXES, axis_types=(AxisType.Auto,) * len(shape))
    return mesh_.mesh(data, model, fsdp=fsdp, devices=topology_devices(slice_))


def _data(slice_: Slice, network, study: str, fsdp: int) -> int:
    """As many data shards as leave three quarters of a chip to other things than weights."""
    weights = _bytes(network)
    if study == "e2e":  # float32: what trains, its two moments and its gradient; the cast copy
        weights += 16 * parts.size(network)
    heads, chips = network.config.lm.kv_heads, slice_.chips // fsdp
    fitting = [
        model for model in range(1, chips + 1)
        if chips % model == 0 and heads % model == 0
        and weights <= slice_.chip.memory / 4 * model * fsdp
    ]  # fmt: skip
    return chips // fitting[0] if fitting else max(1, chips // heads)


def _over(size: Size, mesh, study: str) -> Size:
    """What all data shards work on. The lanes of a sweep are spread, its rows are everywhere."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        rows, lanes = mesh_.shard_count("B"), mesh_.shard_count("R")
    rows = size.rows if study == "sweep" else size.rows * rows
    return dataclasses.replace(size, rows=rows, lanes=size.lanes * lanes)


def _placed(program: Program, network, mesh, lanes: bool) -> Program:
    """The program with each shape where it lies on the mesh."""
    table = families.of(network.config).sharding_rules(network.config)
    weights = rules.specs(network.config, table, _shapes(network), mesh)
    how: dict[str, Callable[[str, Any], P]] = {
        kind: lambda path, leaf: _of_parameter(path, weights)
        for kind in ("weights", "frozen", "optimiser")
    }
    if lanes:
        how["edits"] = lambda path, leaf: _leading("R", leaf)
    else:
        how["batch"] = lambda path, leaf: _leading("B", leaf)

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


def _leading(letter: str, leaf) -> P:
    """What leads with this letter."""
    return (
        mesh_.partition_spec((letter, *(None,) * (len(leaf.shape) - 1)), leaf.shape)
        if leaf.shape
        else P()
    )


def _of_parameter(path: str, weights: Mapping[str, P]) -> P:
    """Where a parameter lies, and what an optimiser has of it; all else is everywhere."""
    found = [name for name in weights if f".{path}".endswith(f".{name}")]
    return weights[max(found, key=len)] if found else P()


def _shapes(network) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every parameter."""
    leaves = jax.tree_util.tree_flatten_with_path(network)[0]
    return {parts.weight_name(path): leaf.shape for path, leaf in leaves}


def _bytes(tree: Any) -> int:
    """What a chip holds of some shapes."""

    def one(leaf) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, (a for a in jax.tree.leaves(tree) if isinstance(a, jax.ShapeDtypeStruct))))


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What the compiler says of a program.

    Attributes:
      text: of the program; None where it does not fit.
      temporary, results, code: bytes. used: those that a program wants that does not fit.
    """

    text: str | None
    temporary: int = 0
    results: int = 0
    code: int = 0
    used: int = 0


def _lower(program: Program, mesh: Mesh) -> jax.stages.Lowered:
    args, fn = [tree for _, tree in program.args], program.fn
    if program.back:
        places = jax.tree.map(lambda leaf: leaf.sharding, args[: program.back])
        fn = jax.jit(
            fn, out_shardings=(*places, None), donate_argnums=tuple(range(program.back))
        )  # as training does
    with jax.set_mesh(mesh):
        return fn.lower(*args, **program.static)


def _compile(lowered: jax.stages.Lowered) -> _Compiled:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _USED.search(str(error))
        if not found:
            raise
        return _Compiled(None, used=int(float(found[1]) * _UNITS[found[2]]))
    memory = compiled.memory_analysis()
    return _Compiled(
        compiled.as_text(),
        temporary=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def _findings(
    program: Program, found: _Compiled | None, ideal: float, chip: Chip | None, subject: Callable
) -> dict[str, Any]:
    """The fields of a plan that depend on what the compiler says."""
    held: dict[str, int] = {}
    for kind, tree in (*program.args, *program.kept):
        name = {"frozen": "weights", "": "other"}.get(kind, kind)
        held[name] = held.get(name, 0) + _bytes(tree)
    capacity = chip.memory if chip else None
    lying = sum(held.values())
    if found is None or found.text is None:
        used = found.used if found else 0
        more = {"activations": max(0, used - lying)} if used else {}
        too_much = max(used, lying) > (capacity or math.inf) or bool(used)
        return {
            "how": COMPILED if found else SHAPES,
            "bytes": held | more,
            "capacity": capacity,
            "fits": False if too_much else None,
            "flops": ideal,
            "moved": None,
            "collectives": (),
            "seconds": _seconds(chip, ideal, lying),
        }
    done = hlo.Program(found.text).work(unknown=program.unknown)
    held |= {"activations": found.temporary, "results": found.results, "code": found.code}
    return {
        "how": COMPILED,
        "bytes": held,
        "capacity": capacity,
        "fits": None if capacity is None else sum(held.values()) <= capacity,
        "flops": done.flops,
        "moved": done.moved,
        "collectives": _exchanged(done.collectives, subject),
        "seconds": _seconds(chip, done.flops, done.moved, done.received),
    }


def _seconds(
    chip: Chip | None, flops: float, moved: float, received: float | None = None
) -> dict[str, float]:
    if chip is None:
        return {}
    found = {"compute": flops / chip.flops, "memory": moved / chip.bandwidth}
    return found if received is None else found | {"links": received / chip.links}


def _exchanged(collectives, subject: Callable[[hlo.Array], str]) -> tuple[dict[str, Any], ...]:
    """Collectives that are alike, together, those that cost most first."""
    found: dict[tuple, dict[str, Any]] = {}
    for c in collectives:
        key = c.kind, str(c.array), c.group
        entry = {
            "kind": c.kind, "of": subject(c.array), "array": str(c.array), "group": c.group,
            "times": 0, "received": c.received, "source": c.source,
        }  # fmt: skip
        found.setdefault(key, entry)["times"] += c.times
    return tuple(sorted(found.values(), key=lambda c: -c["received"] * c["times"]))


def _subjects(network, mesh) -> Callable[[hlo.Array], str]:
    """What an array that chips exchange is, by its shape: (array) -> a word.

    The words are numbers (of few bytes), indices, layer (the weights of one), weights (of no
    layer), stack (of weights of layers), vocabulary (its matrix, or logits) and activation. Under
    `fsdp` what is whole but for the split over `model` is there to be used: a matrix of the
    vocabulary is weights, and one of attention is a layer also where it is seen head by head.
    """
    shares = {math.prod(s) for s in itertools.product(*((1, n) for n in mesh.shape.values()))}
    shapes = _shapes(network)
    lm, model = network.config.lm, mesh.shape["model"]
    vocab, used = lm.vocab, {}
    if mesh.shape["fsdp"] > 1:  # by their axes in any order
        used = {tuple(sorted((vocab // model, lm.width))): "weights"}
        for heads in (lm.heads, lm.kv_heads):
            used[tuple(sorted((heads // model, lm.head_width, lm.width)))] = "layer"
    stacked = {s for name, s in shapes.items() if ".layers." in name or ".look." in name}
    known = {
        "vocabulary": {s for s in shapes.values() if vocab in s},
        "layer": {s[1:] for s in stacked},
        "stack": stacked,
        "weights": set(shapes.values()) - stacked,
    }

    def is_of(dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        return len(dims) == len(shape) and any(
            all(n // d in shares and n % d == 0 for d, n in zip(dims, order, strict=True))
            for order in itertools.permutations(shape)
        )

    def subject(array: hlo.Array) -> str:
        dims = tuple(n for n in array.shape if n > 1)
        if array.bytes < SMALL:
            return "numbers"
        if array.dtype[0] in "su" or array.dtype == "pred":
            return "indices"
        if word := used.get(tuple(sorted(dims))):
            return word
        for word, of in known.items():
            if any(is_of(dims, shape) for shape in of):
                return word
        return "vocabulary" if vocab in dims else "activation"

    return subject


def format_bytes(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "?"
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
