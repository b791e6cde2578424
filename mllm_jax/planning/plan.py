"""Plan the resources of a study on a topology, without weights and without hardware.

The program of the study is compiled for the topology: memory is the compiler's own analysis, work
and traffic are read from the compiled program. Without the compiler for TPUs the plan is made from
shapes only, and states so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mllm_jax.batch import Batch
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.planning import compilation, exchanges, hlo, hlo_work, placement, programs, work
from mllm_jax.planning.chips import GIB, Chip, Slice
from mllm_jax.planning.compilation import Compiled
from mllm_jax.planning.programs import Program, Size
from mllm_jax.report import tables

COMPILED: Literal["compiled"] = "compiled"
SHAPES: Literal["shapes"] = "shapes"
NEVER_GATHERED = {"activation", "vocabulary", "stack"}
GATHERED_IN_TURN = {"layer", "weights"}  # if chips share one copy of the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The resources that a study needs on each chip.

    Attributes:
      study: The name of the study.
      topology: The name of the slice, or of the mesh of present devices.
      data: The size of the mesh axis `data`.
      fsdp: The size of the mesh axis `fsdp`.
      model: The size of the mesh axis `model`.
      rows: The number of rows B over all data shards.
      tokens: The number of tokens T of a row.
      lanes: Lanes of a sweep over all data shards; 0 for other studies.
      how: "compiled" for the topology, or "shapes" if there is no compiler.
      bytes: Bytes of a chip's memory by their use.
      capacity: Bytes of a chip's memory; None if unknown.
      fits: Whether the study fits; None if unknown.
      flops: Operations of matrix products.
      ideal: These operations if the chips shared them evenly, without repetition.
      moved: Bytes from and to main memory; None without a compiler.
      moved_per_token: Bytes moved for each generated token after the first, all rows together.
      collectives: The exchanges between chips: kind, of (the role of the array), array, group,
        times, received (bytes) and source.
      seconds: Lower bounds of the time of a run by compute, memory and links, at the chip's
        published peaks.
    """

    study: str
    topology: str
    data: int
    fsdp: int
    model: int
    rows: int
    tokens: int
    lanes: int
    how: Literal["compiled", "shapes"]
    bytes: dict[str, int]
    capacity: int | None
    fits: bool | None
    flops: float
    ideal: float
    moved: float | None
    collectives: tuple[dict[str, Any], ...]
    seconds: dict[str, float]
    moved_per_token: float | None = None

    @property
    def total(self) -> int:
        """Bytes of a chip's memory that the study uses."""
        return sum(self.bytes.values())

    @property
    def limit(self) -> str | None:
        """The resource with the largest lower bound: compute, memory or links."""
        return max(self.seconds, key=lambda name: self.seconds[name]) if self.seconds else None

    @property
    def received(self) -> float:
        """Bytes that a chip receives from others in a run."""
        return sum(c["received"] * c["times"] for c in self.collectives)

    @property
    def mesh(self) -> str:
        """The sizes of the mesh axes, data x fsdp x model."""
        return f"{self.data} x {self.fsdp} x {self.model}"

    def gathers(self) -> list[dict[str, Any]]:
        """Return gathers of arrays that should stay sharded; `fsdp` gathers the layer in use."""
        stay = NEVER_GATHERED if self.fsdp > 1 else NEVER_GATHERED | GATHERED_IN_TURN
        return [c for c in self.collectives if c["kind"] == "all-gather" and c["of"] in stay]

    def json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        more = {"total": self.total, "limit": self.limit, "received": self.received}
        return dataclasses.asdict(self) | more

    def table(self) -> str:
        """Return the plan as a Markdown table."""
        lanes = f", {self.lanes} lanes" if self.lanes else ""
        head = (
            f"{self.study} on {self.topology}, mesh {self.mesh}: "
            f"{self.rows} rows of {self.tokens} tokens{lanes}"
        )
        if self.how == SHAPES:
            head += "\nFrom shapes only: activations and traffic are unknown without a compiler."
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
        if self.moved_per_token is not None:
            rows.append(("bytes moved by a token", format_bytes(self.moved_per_token)))
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
    dtype: DTypeLike = jnp.bfloat16,
    compile: bool = True,
) -> Plan:
    """Plan the resources of a study on a topology, without weights and without hardware.

    Args:
      model: A network or its config; weights are not read.
      batch: The rows and lanes of one data shard; or a batch of all data shards together.
      edits: The edits of each pass, besides those of the study.
      captures: The captures of each pass, besides those of the study.
      topology: The name of a slice such as "v5e:2x4", "h100" or "h100:8", see `chips`; or a mesh
        of present devices.
      study: A member of `programs.STUDIES`, or captures joined by "+", such as "counts+lens".
      data: The number of data shards, see `mj.mesh`; by default the largest number for which
        weights take at most a quarter of a chip.
      fsdp: The size of the `fsdp` axis; each layer is sharded over the remaining chips.
      dtype: The dtype of the weights.
      compile: Whether to compile for the topology, if the compiler is installed.

    Raises:
      ValueError: The topology or study is unknown, the mesh does not divide the chips, or the
        compiler for GPUs is not installed.
    """
    config = model.config if isinstance(model, MultimodalModel) else model
    network = programs.abstract_model(config, dtype)
    mesh = (
        topology
        if isinstance(topology, Mesh)
        else placement.topology_mesh(topology, network, study, data, fsdp, compile)
    )
    size = placement.total_size(batch if isinstance(batch, Size) else Size(), mesh, study)
    if isinstance(batch, Batch):
        size = dataclasses.replace(size, rows=len(batch.ids))
    else:
        batch = programs.abstract_batch(config, size)
    program = programs.build(study, network, batch.replace(processor=None), edits, captures, size)
    program = placement.place_program(program, network, mesh, lanes=study == "sweep")
    chip = None if isinstance(topology, Mesh) else Slice.parse(topology).chip
    if study == "generate" and chip:
        slots = batch.ids.shape[1] + size.steps - 1
        program = placement.place_layers(program, mesh, chip, size, slots)
    args = [tree for _, tree in program.args]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        flops = work.flops(program.fn, *args, unknown=program.unknown, **program.static)
    options: compilation.CompilerOptions = {}
    if isinstance(topology, Mesh):
        name = f"{topology.size} x {topology.devices.flat[0].device_kind}"
    else:
        name, options = topology, compilation.topology_options(Slice.parse(topology))
    compiled = None
    if compile and isinstance(mesh, Mesh):
        compiled = compilation.compile_lowered(compilation.lower(program, mesh), options)
    return Plan(
        study=study,
        topology=name,
        data=mesh.shape["data"],
        fsdp=mesh.shape["fsdp"],
        model=mesh.shape["model"],
        rows=size.rows,
        tokens=batch.ids.shape[1],
        lanes=size.lanes if study == "sweep" else 0,
        ideal=flops / mesh.size,
        **_findings(
            program, compiled, flops / mesh.size, chip,
            exchanges.classifier(network, mesh), generates=study == "generate",
        ),
    )  # fmt: skip


def summary(plans: Sequence[Plan]) -> str:
    """Return a Markdown table with a line for each plan."""
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
            for p in plans
        ],
    )  # fmt: skip


def _findings(
    program: Program,
    compiled: Compiled | None,
    ideal: float,
    chip: Chip | None,
    subject: Callable,
    generates: bool,
) -> dict[str, Any]:
    """Return the fields of a plan that depend on the result of the compiler."""
    held: dict[str, int] = {}
    for kind, tree in (*program.args, *program.kept):
        name = {"frozen": "weights", "": "other"}.get(kind, kind)
        held[name] = held.get(name, 0) + placement.bytes_per_chip(tree)
    capacity = chip.memory if chip else None
    resident = sum(held.values())
    if compiled is None or compiled.text is None:
        more = {}
        if compiled:  # refused, because it does not fit
            more = {"activations": max(compiled.used - resident, compiled.temporary)}
        too_much = compiled is not None or resident > (capacity or math.inf)
        return {
            "how": COMPILED if compiled else SHAPES,
            "bytes": held | more,
            "capacity": capacity,
            "fits": False if too_much else None,
            "flops": ideal,
            "moved": None,
            "collectives": (),
            "seconds": _seconds(chip, ideal, resident),
        }
    text = hlo.Program(compiled.text)
    counted = hlo_work.count_work(text, unknown=program.unknown)
    held |= {"activations": compiled.temporary, "results": compiled.results, "code": compiled.code}
    return {
        "how": COMPILED,
        "bytes": held,
        "capacity": capacity,
        "fits": None if capacity is None else sum(held.values()) <= capacity,
        "flops": counted.flops,
        "moved": counted.moved,
        "moved_per_token": hlo_work.moved_per_trip(text) if generates else None,
        "collectives": exchanges.group_collectives(counted.collectives, subject),
        "seconds": _seconds(chip, counted.flops, counted.moved, counted.received),
    }


def _seconds(
    chip: Chip | None, flops: float, moved: float, received: float | None = None
) -> dict[str, float]:
    if chip is None:
        return {}
    bounds = {"compute": flops / chip.flops, "memory": moved / chip.bandwidth}
    return bounds if received is None else bounds | {"links": received / chip.links}


def format_bytes(count: float | None) -> str:
    """Format a number of bytes; None is unknown."""
    if count is None:
        return "?"
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Format a time in milliseconds."""
    return f"{seconds * 1e3:.2f} ms"
