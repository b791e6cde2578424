"""Read the text of a compiled program: its instructions, by computation, and its loops."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128,
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


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a compiled program, in the shape that one chip holds.

    Attributes:
      dtype: The element type in HLO's spelling.
      shape: The shape on one chip.
      space: The memory space: 0 is main memory (HBM), others are on the chip or on the host.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * BITS.get(self.dtype, 0) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction.

    Attributes:
      name: Its name, unique in the program.
      arrays: Its results.
      code: Its operation code.
      operands: The names of its operands.
      text: Its attributes as text; of a parameter or constant, its number or value.
      root: Whether it is the result of its computation.
    """

    name: str
    arrays: tuple[Array, ...]
    code: str
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the results in main memory."""
        return sum(array.bytes for array in self.arrays if not array.space)

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """The names of the computations that it calls, by attribute."""
        return {
            how: [name.strip(" %") for name in names.strip("{}").split(",")]
            for how, names in _CALLS.findall(self.text)
        }

    def field(self, name: str) -> str:
        """Return the value of an attribute, or an empty string."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.text)
        return found.group(1).strip("{}") if found else ""


class Program:
    """A compiled program.

    Args:
      text: Its text, as `Compiled.as_text` returns it.

    Attributes:
      computations: The instructions of each computation, by name.
      entry: The name of the computation that runs first.
      devices: The number of chips that run the program.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Op]] = {}
        self.entry = ""
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

    def loops(self) -> list[int | None]:
        """Return the trips of each loop; None where the program does not contain the number."""
        ops = (op for ops in self.computations.values() for op in ops.values())
        return [self.trips(op) for op in ops if op.code == "while"]

    def trips(self, op: Op) -> int | None:
        """Return the trips of a loop, or None.

        The number is written next to the loop, or is the bound that its counter is compared with. A
        counter of JAX starts at 0 unless its start is data; then this is an upper bound.
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
        """Return the step of the counter of a loop: 2 for a loop that is unrolled by two."""
        body = self.computations.get(op.called.get("body", [""])[0], {})
        root = next((o for o in body.values() if o.root), None)
        if counter is None or root is None or not counter.field("index"):
            return 1
        adds = body.get(root.operands[int(counter.field("index"))])
        if adds is None or adds.code != "add":
            return 1
        numbers = (body[name] for name in adds.operands if name in body)
        return next((int(o.text) for o in numbers if o.code == "constant"), 1)

    def fused(self, op: Op) -> dict[str, Op] | None:
        """Return the instructions of a fusion; None for other instructions."""
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
    """Return the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _arrays(shape: str) -> tuple[Array, ...]:
    def parse(dtype: str, dims: str, layout: str) -> Array:
        space = re.search(r"S\((\d+)\)", layout or "")
        dims_ = tuple(int(n) for n in dims.split(",") if n)
        return Array(dtype, dims_, int(space.group(1)) if space else 0)

    return tuple(parse(*found) for found in _ARRAY.findall(shape) if found[0] in BITS)
