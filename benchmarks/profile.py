"""Where a compiled program spends its time: the profiler's operations, by function.

XLA remembers for each operation which Python functions asked for it: the model needs no marks.
"""

from __future__ import annotations

import collections
import glob
import re
import tempfile
from collections.abc import Callable

import jax

_CONTAINERS = ("while", "call", "conditional")


def seconds(run: Callable, *args, rounds: int = 3) -> dict[tuple[str, tuple[str, ...]], float]:
    """Seconds of one run by (operation, the functions that asked for it, outermost first).

    Where several operations are under way at one moment, each has its part of it.

    Args:
      run: the function to compile.
      *args: its arguments.
      rounds: runs to take the mean of.
    """
    compiled = jax.jit(run).lower(*args).compile()
    stacks = _stacks(compiled.as_text())
    jax.block_until_ready(compiled(*args))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(rounds):
                jax.block_until_ready(compiled(*args))
        (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
        spans = _spans(jax.profiler.ProfileData.from_file(path))
    return {(name, stacks.get(name, ())): s / rounds for name, s in _divide(spans).items()}


def _spans(data) -> list[tuple[str, float, float]]:
    """(operation, start, end) in nanoseconds."""
    begun, ended = [], {}
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and not stats["hlo_op"].startswith(_CONTAINERS):
                    begun.append((stats["hlo_op"], event.start_ns, event.end_ns, stats.get("_p")))
                elif event.name.startswith("end: "):  # of one that went on in other threads
                    ended[stats.get("_c")] = event.end_ns
    return [(name, start, max(end, ended.get(key, end))) for name, start, end, key in begun]


def _divide(spans) -> dict[str, float]:
    """Seconds of each operation, time divided among those under way."""
    moments = sorted(
        [(start, 1, i) for i, (_, start, _) in enumerate(spans)]
        + [(end, 0, i) for i, (_, _, end) in enumerate(spans)]
    )
    under_way, found, before = set(), collections.Counter(), 0.0
    for now, begins, i in moments:
        for j in under_way:
            found[spans[j][0]] += (now - before) / len(under_way) * 1e-9
        (under_way.add if begins else under_way.discard)(i)
        before = now
    return dict(found)


def _stacks(text: str) -> dict[str, tuple[str, ...]]:
    """The functions that asked for each operation of a compiled program."""
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
        found = []
        while frame in frames:
            name, parent = frames[frame]
            found.append(name)
            frame = str(int(parent) - 1)  # counted from 1, 0 for none
        return tuple(reversed(found))

    operations = re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = .*stack_frame_id=(\d+)", text, re.M)
    return {name: stack(frame) for name, frame in operations}


def _section(text: str, title: str) -> str:
    """The lines after a title, up to an empty one."""
    return text.partition(f"\n{title}\n")[2].partition("\n\n")[0]
