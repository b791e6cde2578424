"""Measure seconds and the rise of resident memory, for every side, with Python alone."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

_STATUS = pathlib.Path("/proc/self/status")
_RESET = pathlib.Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Lap:
    """One measured run.

    Attributes:
        result: the result of the run.
        seconds: its wall-clock time.
        cpu: the CPU time of all its threads, on which other work has less influence.
        rise: the peak of resident memory above that before the run, in bytes; None on systems
            other than Linux.
    """

    result: Any
    seconds: float
    cpu: float
    rise: int | None


def lap(run: Callable[[], Any]) -> Lap:
    """Run once and measure."""
    before = _resident()
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rise = None if before is None else max(0, _read("VmHWM") - before)
    return Lap(result, seconds, cpu, rise)


def _resident() -> int | None:
    """Reset the peak of resident memory, and return the resident bytes."""
    try:
        _RESET.write_text("5")
        return _read("VmRSS")
    except OSError:
        return None


def _read(field: str) -> int:
    """Return the bytes of a field of Linux's status of this process."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
