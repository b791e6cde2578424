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
    """Return how many programs XLA has compiled in this process since mllm_jax was imported."""
    return _count
