"""The compile counter, which makes recompilation visible."""

from __future__ import annotations

import jax

_count = 0


def _count_compile(event: str, duration_secs: float, **_) -> None:
    global _count
    if event == "/jax/core/compile/backend_compile_duration":
        _count += 1


jax.monitoring.register_event_duration_secs_listener(_count_compile)


def compiles() -> int:
    """Return the number of programs that XLA has compiled since mllm_jax was imported."""
    return _count
