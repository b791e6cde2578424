"""Read the collectives of a compiled program: the exchanged arrays and the sizes of groups."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from mllm_jax.planning.hlo import Array, Op

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_ALL = re.compile(r"replica_groups=\{\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between chips.

    Attributes:
      kind: A member of COLLECTIVES.
      array: The array that each chip holds afterwards.
      group: The number of chips that exchange with each other.
      times: The number of executions in one run.
      source: The operation of the program that needs it.
    """

    kind: str
    array: Array
    group: int
    times: int
    source: str

    @property
    def received(self) -> float:
        """Bytes that a chip receives in one execution, at least, by any algorithm."""
        n, size = self.group, self.array.bytes
        factor = {
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n,
            "ragged-all-to-all": (n - 1) / n,
        }
        return size * factor.get(self.kind, 1)


def read(op: Op, ops: Mapping[str, Op], times: int, devices: int) -> list[Collective]:
    """Return the collectives that an instruction starts.

    Args:
      op: The instruction.
      ops: The instructions of its computation, by name.
      times: The number of executions in one run.
      devices: The number of chips that run the program.
    """
    kind = op.code.removesuffix("-start")
    if kind not in COLLECTIVES or is_continuation(op, ops):
        return []
    arrays, scatter = results(op), kept_part(op, ops)
    if scatter is not None:
        kind, arrays = "reduce-scatter", scatter.arrays
    group, source = group_size(op, devices), op.field("op_name").strip('"')
    return [Collective(kind, array, group, times, source) for array in arrays]


def is_continuation(op: Op, ops: Mapping[str, Op]) -> bool:
    """Return whether this is a running collective that another instruction has started.

    The compiler for TPUs overlaps a collective with other work by writing it into every fusion
    that it spans, each time with the same `chain_id`.
    """
    return "chain_id=" in op.text and not any(
        "AsyncCollectiveStart" in o.text and op.name in o.operands for o in ops.values()
    )


def is_end(op: Op) -> bool:
    """Return whether an instruction ends a collective that runs beside other work."""
    return "AsyncCollectiveDone" in op.text


def passes_through(op: Op, ops: Mapping[str, Op]) -> bool:
    """Return whether an instruction of a fusion passes its operands on without reading them."""
    return (op.root and op.code == "tuple") or is_end(op) or is_continuation(op, ops)


def kept_part(op: Op, ops: Mapping[str, Op]) -> Op | None:
    """Return the part of an all-reduce that a chip keeps, if it keeps only a slice."""
    root = next((o for o in ops.values() if o.root), None)
    kept = root is not None and root.code == "dynamic-slice" and root.operands[0] == op.name
    return root if kept and op.code == "all-reduce" else None


def results(op: Op) -> tuple[Array, ...]:
    """Return the results of an instruction, without the operands that a start also returns."""
    kind = op.code.removesuffix("-start")
    if kind == op.code or kind == "all-reduce":
        return op.arrays
    count = 1 if kind in ("collective-permute", "copy", "slice") else len(op.operands)
    return op.arrays[count : 2 * count]


def group_size(op: Op, devices: int) -> int:
    """Return the number of chips that exchange with each other.

    Raises:
      ValueError: The groups of the instruction cannot be read.
    """
    if "source_target_pairs" in op.text:
        return 2
    if match := _GROUPS.search(op.text):
        return int(match.group(2))
    if match := _GROUP.search(op.text):
        return len(match.group(1).split(","))
    if match := _AXES.search(op.text):  # 'x'=2,'y'=4] {'x','y':(1)2}: all of x, and 2 of y
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if _ALL.search(op.text):
        return devices
    raise ValueError(f"{op.name}: the chips of this {op.code} cannot be read: {op.text[:200]}")
