"""Reads a compiled program: matrix products, bytes moved and collectives, loops counted out.

`cost_analysis` of a compiled program counts the body of a loop once. Here a body counts as often
as it runs: XLA writes the number of trips next to a loop whose length it knows, and the caller
gives it for the others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128,
}  # fmt: skip
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
# What moves no bytes itself.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "domain",
    "add-dependency", "optimization-barrier", "send", "recv", "custom-call-done",
}  # fmt: skip

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLS = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count\\?"?\s*[:=]\s*\{\s*\\?"?n\\?"?\s*:\s*\\?"?(\d+)')
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_ALL = re.compile(r"replica_groups=\{\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as the compiler sees it: in the shape that one chip holds.

    Attributes:
      space: memory space: 0 is the main memory (HBM), others are on the chip or on the host.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS.get(self.dtype, 0) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction: what it gives, what it does, what it reads, and all else as text."""

    name: str
    arrays: tuple[Array, ...]
    code: str
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays if not array.space)

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """Computations by the way they are called."""
        return {
            how: [name.strip(" %") for name in names.strip("{}").split(",")]
            for how, names in _CALLS.findall(self.text)
        }

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.text)
        return found.group(1).strip("{}") if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """What chips exchange.

    Attributes:
      kind: of COLLECTIVES. array: what each chip has of it afterwards.
      group: chips that exchange it with each other.
      times: how often in one run.
      source: the operation of the program that it is made for.
    """

    kind: str
    array: Array
    group: int
    times: int
    source: str

    @property
    def received(self) -> float:
        """Bytes that a chip receives each time: what no algorithm can do without."""
        n, size = self.group, self.array.bytes
        factor = {
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n,
            "ragged-all-to-all": (n - 1) / n,
        }
        return size * factor.get(self.kind, 1)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does in one run of a program.

    Attributes:
      flops: of matrix products; an addition and a multiplication are two.
      moved: bytes read from and written to main memory by the operations of the program.
      collectives: in the order of the program.
    """

    flops: float
    moved: float
    collectives: tuple[Collective, ...]

    @property
    def received(self) -> float:
        return sum(c.received * c.times for c in self.collectives)


class Program:
    """A compiled program by its text: instructions by computation."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Op]] = {}
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(partitions.group(1)) if partitions else 1
        ops: dict[str, Op] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                ops = self.computations[head.group(2)] = {}
                if head.group(1):
                    self.entry = head.group(2)
            elif found := _LINE.match(line):
                op = _read(found.group(2), found.group(3), bool(found.group(1)))
                ops[op.name] = op

    def work(self, *, unknown: int = 1) -> Work:
        """What one chip does.

        Args:
          unknown: trips of a loop whose length is data.
        """
        flops = moved = 0.0
        collectives: list[Collective] = []
        for times, inside, op, ops in self._run(self.entry, 1, False, unknown):
            flops += times * _flops(op, ops)
            if not inside:
                moved += times * self._moved(op, ops)
            if (kind := _collective(op)) and not _goes_on(op, ops):
                arrays, scatter = _result(op), _scattered(op, ops)
                if scatter is not None:
                    kind, arrays = "reduce-scatter", scatter.arrays
                collectives += [
                    Collective(
                        kind, part, _group(op, self.devices), times, op.field("op_name").strip('"')
                    )
                    for part in arrays
                ]
        return Work(flops, moved, tuple(c for c in collectives if c.group > 1))

    def loops(self) -> list[int | None]:
        """Trips of each loop, None where the program does not tell."""
        ops = (op for ops in self.computations.values() for op in ops.values())
        return [self._trips(op) for op in ops if op.code == "while"]

    def _trips(self, op: Op) -> int | None:
        """What XLA wrote next to the loop, or the bound that its counter is compared with.

        A counter of JAX begins at 0 unless the program begins it with data: then this is the most.
        """
        if found := _TRIPS.search(op.text):
            return int(found.group(1))
        ops = self.computations.get(op.called.get("condition", [""])[0], {})
        root = next((o for o in ops.values() if o.root), None)
        if root is None or root.code != "compare" or root.field("direction") != "LT":
            return None
        bound = ops.get(root.operands[1])
        if bound is None or bound.code != "constant":
            return None
        return math.ceil(int(bound.text) / self._step(op, ops.get(root.operands[0])))

    def _step(self, op: Op, counter: Op | None) -> int:
        """What a round adds to the counter of a loop: a loop unrolled by two adds 2."""
        body = self.computations.get(op.called.get("body", [""])[0], {})
        root = next((o for o in body.values() if o.root), None)
        if counter is None or root is None or not counter.field("index"):
            return 1
        adds = body.get(root.operands[int(counter.field("index"))])
        if adds is None or adds.code != "add":
            return 1
        numbers = (body[name] for name in adds.operands if name in body)
        return next((int(o.text) for o in numbers if o.code == "constant"), 1)

    def _run(
        self, name: str, times: int, inside: bool, unknown: int
    ) -> Iterator[tuple[int, bool, Op, dict[str, Op]]]:
        """Every instruction with how often it runs and whether it is inside of another."""
        ops = self.computations.get(name, {})
        for op in ops.values():
            yield times, inside, op, ops
            called = op.called
            if op.code == "while":
                trips = self._trips(op)
                trips = unknown if trips is None else trips
                for body in called.get("body", ()):
                    yield from self._run(body, times * trips, inside, unknown)
            elif op.code == "conditional":
                names = called.get("branch_computations", [])
                names = names or called["true_computation"] + called["false_computation"]
                yield from self._run(max(names, key=self._weight), times, inside, unknown)
            elif op.code == "call":
                for body in called.get("to_apply", ()):
                    yield from self._run(body, times, inside, unknown)
            else:
                for body in called.get("calls", ()):
                    yield from self._run(body, times, True, unknown)

    @functools.cache  # noqa: B019 - a program is read once and dropped
    def _weight(self, name: str) -> float:
        """How much a branch does, to find the one that does most."""
        return sum(
            times * (1 + _flops(op, ops) + op.bytes)
            for times, _, op, ops in self._run(name, 1, False, 1)
        )

    def _moved(self, op: Op, ops: dict[str, Op]) -> float:
        """Bytes of main memory that an instruction reads and writes."""
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
            return reads + sum(array.bytes for array in _result(op) if not array.space)
        return reads + self._written(op)

    def _read(self, op: Op, number: int, operand: Op) -> float:
        """Bytes that an instruction reads of an operand: of a slice, no more than the slice."""
        part = self._part(op, number)
        return operand.bytes if part is None else min(part, operand.bytes)

    def _part(self, op: Op, number: int) -> int | None:
        """Bytes of an operand that an instruction needs; None where it needs all of it."""
        if op.code.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
            return None if number else sum(array.bytes for array in _result(op))
        if op.code == "dynamic-update-slice":
            return None if number else 0  # written in place
        inner = self._fused(op)
        if inner is None:
            return None
        named = (o.name for o in inner.values() if o.code == "parameter" and o.text == str(number))
        return self._parts(next(named, None), inner)

    def _parts(self, name: str | None, ops: dict[str, Op]) -> int | None:
        """The same over all that use a name; what leaves as it is may be used as a whole."""
        if name is None or ops[name].root:
            return None
        total = 0
        for user in ops.values():
            if _hands_on(user, ops):
                continue
            for number, operand in enumerate(user.operands):
                if operand == name:
                    bitcast = user.code == "bitcast"
                    part = self._parts(user.name, ops) if bitcast else self._part(user, number)
                    if part is None:
                        return None
                    total += part
        return total

    def _written(self, op: Op) -> float:
        """Bytes that an instruction writes: of an update in place, no more than the update."""
        inner = self._fused(op)
        root = next((o for o in inner.values() if o.root), None) if inner else None
        if root is None or not op.bytes:
            return op.bytes
        if root.code == "dynamic-update-slice":
            return _all_bytes(inner.get(root.operands[1]))
        if root.code == "tuple":  # what is only handed on stays where it is
            made = (inner[name] for name in root.operands)
            return sum(o.bytes for o in made if o.code != "parameter" and not _goes_on(o, inner))
        return 0 if _ends(root) else op.bytes

    def _fused(self, op: Op) -> dict[str, Op] | None:
        if op.code != "fusion":
            return None
        return self.computations.get(op.called.get("calls", [""])[0])


def _read(name: str, rest: str, root: bool) -> Op:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    code = rest[:opening]
    text = inside if code in ("parameter", "constant") else rest[closing + 1 :]
    return Op(name, _arrays(shape), code, tuple(_NAME.findall(inside)), text, root)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _arrays(shape: str) -> tuple[Array, ...]:
    def one(dtype: str, dims: str, layout: str) -> Array:
        space = re.search(r"S\((\d+)\)", layout or "")
        dims_ = tuple(int(n) for n in dims.split(",") if n)
        return Array(dtype, dims_, int(space.group(1)) if space else 0)

    return tuple(one(*found) for found in _ARRAY.findall(shape) if found[0] in BITS)


def _all_bytes(op: Op | None) -> int:
    return sum(array.bytes for array in op.arrays) if op is not None else 0


def _collective(op: Op) -> str | None:
    code = op.code.removesuffix("-start")
    return code if code in COLLECTIVES else None


def _goes_on(op: Op, ops: dict[str, Op]) -> bool:
    """Whether this is a collective on its way, which has been started elsewhere.

    The compiler for TPU lets one go on beside other work by writing it into every fusion that it
    spans, all with one `chain_id`.
    """
    return "chain_id=" in op.text and not any(
        "AsyncCollectiveStart" in o.text and op.name in o.operands for o in ops.values()
    )


def _ends(op: Op) -> bool:
    return "AsyncCollectiveDone" in op.text


def _hands_on(op: Op, ops: dict[str, Op]) -> bool:
    """Whether an instruction inside of a fusion passes on what it is given, unread."""
    return (op.root and op.code == "tuple") or _ends(op) or _goes_on(op, ops)


def _scattered(op: Op, ops: dict[str, Op]) -> Op | None:
    """The part that a chip keeps of an all-reduce, if the compiler for TPU keeps no more."""
    root = next((o for o in ops.values() if o.root), None)
    kept = root is not None and root.code == "dynamic-slice" and root.operands[0] == op.name
    return root if kept and op.code == "all-reduce" else None


def _result(op: Op) -> tuple[Array, ...]:
    """What comes out of an instruction; one that starts something gives its operands as well."""
    kind = op.code.removesuffix("-start")
    if kind == op.code or kind == "all-reduce":
        return op.arrays
    count = 1 if kind in ("collective-permute", "copy", "slice") else len(op.operands)
    return op.arrays[count : 2 * count]


def _group(op: Op, devices: int) -> int:
    """How many chips exchange with each other."""
    if "source_target_pairs" in op.text:
        return 2
    if found := _GROUPS.search(op.text):
        return int(found.group(2))
    if found := _GROUP.search(op.text):
        return len(found.group(1).split(","))
    if found := _AXES.search(op.text):  # 'x'=2,'y'=4] {'x','y':(1)2}: all of x, and 2 of y
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if _ALL.search(op.text):
        return devices
    raise ValueError(f"{op.name}: the chips of this {op.code} cannot be read: {op.text[:200]}")


def _flops(op: Op, ops: dict[str, Op]) -> float:
    if op.code not in ("dot", "convolution"):
        return 0
    left, right = (ops[name].arrays[0].shape for name in op.operands[:2])
    out = op.arrays[0].shape
    if op.code == "dot":
        axes = [int(n) for n in op.field("lhs_contracting_dims").split(",") if n]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
    return _convolution_flops(op, left, right, out)


def _convolution_flops(op: Op, left, right, out) -> float:
    """As XLA counts them: only products of what is there, not of padding or of gaps.

    The compiler for TPU writes every matrix product as a convolution; axes of a batch become
    spatial ones with padding, which would be counted many times otherwise.
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
