"""The compile counter: what a sweep that recompiles would cost, made visible."""

from __future__ import annotations

import jax

_count = 0


def _heard(event: str, duration: float, **_) -> None:
    global _count
    if event == "/jax/core/compile/backend_compile_duration":
        _count += 1


jax.monitoring.register_event_duration_secs_listener(_heard)


def compiles() -> int:
    """Programs that XLA has compiled in this process since mllm_jax was imported."""
    return _count
