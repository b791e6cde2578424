"""Measure seconds and memory, for every side, with Python alone."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

_STATUS = pathlib.Path("/proc/self/status")
_RESET = pathlib.Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Lap:
    """One measured run.

    Attributes:
      result: The result of the run.
      seconds: Its wall-clock time.
      cpu: The CPU time of all its threads, on which other work has less influence.
      rise: The peak of resident memory above that before the run, in bytes; None on systems
        other than Linux.
      peak: The most bytes in use on a GPU or TPU: of this run where torch computes, since the
        process began where JAX does; None without one.
    """

    result: Any
    seconds: float
    cpu: float
    rise: int | None
    peak: int | None = None


def lap(run: Callable[[], Any]) -> Lap:
    """Run once and measure."""
    before = _resident()
    _forget_peak()
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rise = None if before is None else max(0, _read("VmHWM") - before)
    return Lap(result, seconds, cpu, rise, _device_peak())


def _forget_peak() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _device_peak() -> int | None:
    """Return the peak of the library that this process computes with."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    jax = sys.modules.get("jax")
    stats = jax.local_devices()[0].memory_stats() if jax is not None else None
    return (stats or {}).get("peak_bytes_in_use")


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
