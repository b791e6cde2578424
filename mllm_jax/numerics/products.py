"""Which library multiplies matrices on a CPU.

XLA's own choice of today (YNNPACK) gives a row the same bits whatever other rows stand beside it,
however many lanes a sweep has. Eigen, its choice of before, is
faster where rows are many or few, as in sweeps and in decoding; it is several times slower at the
head of a tied vocabulary with a hundred rows, as in the lens; and it differs in the last bits where
the number of rows does.
"""

from __future__ import annotations

import importlib.util
import os

import jaxlib

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def prefer_eigen() -> None:
    """Asks XLA for Eigen, if this process has but CPUs. To be called before JAX computes anything.

    What XLA_FLAGS says about it already is left as it is. XLA ends a program that gives it a flag
    it does not know, so that versions this was not tried with are left alone as well.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    known = jaxlib.__version__.split(".")[:2] == ["0", "10"]
    if known and _FLAG not in flags and not any(map(importlib.util.find_spec, _ACCELERATORS)):
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=".strip()
