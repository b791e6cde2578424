"""Count the work of a compiled program: matrix products, bytes moved and collectives.

`cost_analysis` of a compiled program counts the body of a loop once. Here a body is counted once
per trip: XLA writes the number of trips next to a loop whose length it knows, and the caller gives
it for other loops.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from mllm_jax.planning import hlo_collectives as collectives
from mllm_jax.planning.hlo import Op, Program
from mllm_jax.planning.hlo_collectives import Collective

# Instructions that move no bytes themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "domain",
    "add-dependency", "optimization-barrier", "send", "recv", "custom-call-done",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one chip in one run of a program.

    Attributes:
      flops: Operations of matrix products; an addition and a multiplication are two.
      moved: Bytes that the operations of the program read from and write to main memory.
      collectives: The collectives, in the order of the program.
    """

    flops: float
    moved: float
    collectives: tuple[Collective, ...]

    @property
    def received(self) -> float:
        """Bytes that a chip receives from others."""
        return sum(c.received * c.times for c in self.collectives)


def count_work(program: Program, *, unknown: int = 1) -> Work:
    """Count the work of one chip.

    Args:
      program: The compiled program.
      unknown: The number of trips of a loop whose length is data.
    """
    return _Counter(program, unknown).work()


def moved_per_trip(program: Program) -> float:
    """Return the bytes that each trip of the loops whose length is data moves on one chip."""
    one, none = (count_work(program, unknown=trips).moved for trips in (1, 0))
    return one - none


class _Counter:
    def __init__(self, program: Program, unknown: int):
        self.program, self.unknown = program, unknown

    def work(self) -> Work:
        flops = moved = 0.0
        exchanged: list[Collective] = []
        instructions = self._instructions(self.program.entry, 1, False, self.unknown)
        for times, fused, op, ops in instructions:
            flops += times * _flops(op, ops)
            if not fused:
                moved += times * self._moved(op, ops)
            exchanged += collectives.read(op, ops, times, self.program.devices)
        return Work(flops, moved, tuple(c for c in exchanged if c.group > 1))

    def _instructions(
        self, name: str, times: int, fused: bool, unknown: int
    ) -> Iterator[tuple[int, bool, Op, dict[str, Op]]]:
        """Yield (times it runs, whether it is inside a fusion, instruction, its computation)."""
        ops = self.program.computations.get(name, {})
        for op in ops.values():
            yield times, fused, op, ops
            called = op.called
            if op.code == "while":
                trips = self.program.trips(op)
                trips = unknown if trips is None else trips
                for body in called.get("body", ()):
                    yield from self._instructions(body, times * trips, fused, unknown)
            elif op.code == "conditional":
                names = called.get("branch_computations", [])
                names = names or called["true_computation"] + called["false_computation"]
                yield from self._instructions(max(names, key=self._weight), times, fused, unknown)
            elif op.code == "call":
                for body in called.get("to_apply", ()):
                    yield from self._instructions(body, times, fused, unknown)
            else:
                for body in called.get("calls", ()):
                    yield from self._instructions(body, times, True, unknown)

    @functools.cache  # noqa: B019 - a program is read once and dropped
    def _weight(self, name: str) -> float:
        """Estimate the work of a branch, to find the branch with the most work."""
        return sum(
            times * (1 + _flops(op, ops) + op.bytes)
            for times, _, op, ops in self._instructions(name, 1, False, 1)
        )

    def _moved(self, op: Op, ops: dict[str, Op]) -> float:
        """Return the bytes of main memory that an instruction reads and writes."""
        if op.code in _FREE or op.code.endswith("-done"):
            return 0
        if op.code in ("dynamic-slice", "slice", "gather"):
            return 2 * op.bytes
        if op.code == "dynamic-update-slice":
            return 2 * _all_bytes(ops.get(op.operands[1]))
        reads = sum(
            self._read(op, i, ops[operand])
            for i, operand in enumerate(op.operands)
            if operand in ops
        )
        if op.code.endswith("-start"):
            return reads + sum(array.bytes for array in collectives.results(op) if not array.space)
        return reads + self._written(op)

    def _read(self, op: Op, number: int, operand: Op) -> float:
        """Return the bytes that an instruction reads of an operand; a slice reads only itself."""
        part = self._part(op, number)
        return operand.bytes if part is None else min(part, operand.bytes)

    def _part(self, op: Op, number: int) -> int | None:
        """Return the bytes of an operand that an instruction reads; None for the whole operand."""
        if op.code.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
            return None if number else sum(array.bytes for array in collectives.results(op))
        if op.code == "dynamic-update-slice":
            return None if number else 0  # written in place
        inner = self.program.fused(op)
        if inner is None:
            return None
        named = (o.name for o in inner.values() if o.code == "parameter" and o.text == str(number))
        return self._parts(next(named, None), inner)

    def _parts(self, name: str | None, ops: dict[str, Op]) -> int | None:
        """Sum `_part` over the users of a name; None if it leaves the computation unchanged."""
        if name is None or ops[name].root:
            return None
        total = 0
        for user in ops.values():
            if collectives.passes_through(user, ops):
                continue
            for number, operand in enumerate(user.operands):
                if operand == name:
                    part = self._part_of_user(name, number, user, ops)
                    if part is None:
                        return None
                    total += part
        return total

    def _part_of_user(self, name: str, number: int, user: Op, ops: dict[str, Op]) -> int | None:
        """Return `_part` of a user of a name; within a fusion, conversions are not materialised."""
        if user.code not in ("bitcast", "convert"):
            return self._part(user, number)
        part = self._parts(user.name, ops)
        return part and part * ops[name].bytes // user.bytes

    def _written(self, op: Op) -> float:
        """Return the bytes that an instruction writes; updates in place write only the update."""
        inner = self.program.fused(op) or {}
        root = next((o for o in inner.values() if o.root), None)
        if root is None or not op.bytes:
            return op.bytes
        if root.code == "dynamic-update-slice":
            return _all_bytes(inner.get(root.operands[1]))
        if root.code == "tuple":  # parameters that pass through are not written
            made = (inner[name] for name in root.operands)
            return sum(
                o.bytes
                for o in made
                if o.code != "parameter" and not collectives.is_continuation(o, inner)
            )
        return 0 if collectives.is_end(root) else op.bytes


def _all_bytes(op: Op | None) -> int:
    return sum(array.bytes for array in op.arrays) if op is not None else 0


def _flops(op: Op, ops: dict[str, Op]) -> float:
    if op.code == "custom-call" and "__cudnn$fmha" in op.text:
        return _attention_flops(op, ops)
    if op.code not in ("dot", "convolution"):
        return 0
    left, right = (ops[name].arrays[0].shape for name in op.operands[:2])
    out = op.arrays[0].shape
    if op.code == "dot":
        axes = [int(n) for n in op.field("lhs_contracting_dims").split(",") if n]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
    return _convolution_flops(op, left, right, out)


def _attention_flops(op: Op, ops: dict[str, Op]) -> float:
    """Count the products of cuDNN's attention; if causal, those of earlier keys only."""
    query, key = (ops[name].arrays[0].shape for name in op.operands[:2])  # [B, T, N, H]
    products = 4 * math.prod(query) * key[1]
    return products / 2 if '"mask_type": "CAUSAL"' in op.text else products


def _convolution_flops(
    op: Op, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Count the products of a convolution as XLA does, without those of padding and gaps.

    The compiler for TPUs writes every matrix product as a convolution in which batch axes become
    padded spatial axes. With the padding these would be counted many times.
    """
    kernel_axes, rest = op.field("dim_labels").split("_")[1].split("->")
    input_axes = op.field("dim_labels").split("_")[0]
    window = {
        name: values.split("x")
        for name, values in re.findall(r"(\w+)=([\d_x\-]+)", _window(op.text))
    }

    def each(name: str, axis: int, default: str) -> str:
        values = window.get(name)
        return values[axis] if values else default

    total = 2.0
    for n, axis in enumerate(sorted(axis for axis in kernel_axes if axis.isdigit())):
        low = int(each("pad", n, "0_0").split("_")[0])
        stride, gap, holes = (
            int(each(name, n, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        kernel, source = right[kernel_axes.index(axis)], left[input_axes.index(axis)]
        at = (
            np.arange(out[rest.index(axis)])[:, None] * stride
            - low
            + np.arange(kernel)[None] * holes
        )
        total *= ((at % gap == 0) & (at >= 0) & (at // gap < source)).sum()
    groups = int(op.field("batch_group_count") or 1)
    batch, features = left[input_axes.index("b")], out[rest.index("f")]
    return total * batch // groups * features * right[kernel_axes.index("i")]


def _window(text: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", text)
    return found.group(1) if found else ""
