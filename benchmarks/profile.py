"""Measure the time of the operations of a compiled program with the profiler, by function.

XLA records the Python functions that called each operation, so the model needs no annotations.
"""

from __future__ import annotations

import collections
import glob
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

_CONTAINERS = ("while", "call", "conditional")


def seconds(run: Callable, *args, rounds: int = 3) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the seconds of one run by operation and the functions that called it.

    Operations that run at the same moment share it equally.

    Args:
      run: The function to compile.
      *args: Its arguments.
      rounds: The number of runs, whose mean is returned.

    Returns:
      {(operation, functions, the outermost first): seconds}.
    """
    compiled = jax.jit(run).lower(*args).compile()
    stacks = _stacks(compiled.as_text() or "")
    jax.block_until_ready(compiled(*args))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(rounds):
                jax.block_until_ready(compiled(*args))
        (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
        spans = _spans(jax.profiler.ProfileData.from_file(path))
    return {(name, stacks.get(name, ())): s / rounds for name, s in _divide(spans).items()}


def _spans(data: Any) -> list[tuple[str, float, float]]:
    """Return the (operation, start, end) of a profile, in nanoseconds."""
    begun, ended = [], {}
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and not stats["hlo_op"].startswith(_CONTAINERS):
                    begun.append((stats["hlo_op"], event.start_ns, event.end_ns, stats.get("_p")))
                elif event.name.startswith("end: "):  # of an operation that other threads continued
                    ended[stats.get("_c")] = event.end_ns
    return [(name, start, max(end, ended.get(key, end))) for name, start, end, key in begun]


def _divide(spans: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """Return the seconds of each operation; those that run at the same moment share it."""
    moments = sorted(
        [(start, 1, i) for i, (_, start, _) in enumerate(spans)]
        + [(end, 0, i) for i, (_, _, end) in enumerate(spans)]
    )
    running: set[int] = set()
    seconds: dict[str, float] = collections.defaultdict(float)
    before = 0.0
    for now, begins, i in moments:
        for j in running:
            seconds[spans[j][0]] += (now - before) / len(running) * 1e-9
        (running.add if begins else running.discard)(i)
        before = now
    return dict(seconds)


def _stacks(text: str) -> dict[str, tuple[str, ...]]:
    """Return the functions that called each operation of a compiled program."""
    names = dict(re.findall(r'^(\d+) "(.*)"$', _section(text, "FunctionNames"), re.M))
    places = dict(
        re.findall(r"^(\d+) {.*function_name_id=(\d+)", _section(text, "FileLocations"), re.M)
    )
    rows = re.findall(
        r"^(\d+) {file_location_id=(\d+) parent_frame_id=(\d+)}",
        _section(text, "StackFrames"), re.M,
    )  # fmt: skip
    frames = {row: (names[places[place]], parent) for row, place, parent in rows}

    def stack(frame: str) -> tuple[str, ...]:
        functions = []
        while frame in frames:
            name, parent = frames[frame]
            functions.append(name)
            frame = str(int(parent) - 1)  # counted from 1, 0 for none
        return tuple(reversed(functions))

    operations = re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = .*stack_frame_id=(\d+)", text, re.M)
    return {name: stack(frame) for name, frame in operations}


def _section(text: str, title: str) -> str:
    """Return the lines after a title, up to an empty one."""
    return text.partition(f"\n{title}\n")[2].partition("\n\n")[0]
