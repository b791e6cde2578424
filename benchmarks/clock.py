"""The clock of every side: seconds, and how far resident memory rose. Needs nothing but Python."""

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
    """One run.

    Attributes:
      result: what was computed.
      seconds: how long it took.
      cpu: seconds of all its threads, which other work on the machine lengthens less.
      rise: bytes, highest resident memory during the run above that before it; None where the
        system does not tell (other than Linux).
    """

    result: Any
    seconds: float
    cpu: float
    rise: int | None


def lap(run: Callable[[], Any]) -> Lap:
    """Runs once."""
    before = _resident()
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rise = None if before is None else max(0, _read("VmHWM") - before)
    return Lap(result, seconds, cpu, rise)


def _resident() -> int | None:
    """Bytes resident now; from here on the high-water mark is counted anew."""
    try:
        _RESET.write_text("5")
        return _read("VmRSS")
    except OSError:
        return None


def _read(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
