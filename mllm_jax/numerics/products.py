"""Choose the library that multiplies matrices on a CPU.

YNNPACK, the default of current XLA versions, computes the same bits for a row whatever other rows
stand beside it, and so for any number of lanes in a sweep. Eigen, the former default, is faster for
very many or very few rows, as in sweeps and in decoding; it is several times slower for about a
hundred rows times a tied vocabulary, as in the logit lens; and its last bits depend on the number
of rows.
"""

from __future__ import annotations

import importlib.util
import os

import jaxlib

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def prefer_eigen() -> None:
    """Make XLA use Eigen, if this process has only CPUs; call it before JAX computes anything.

    A value for the flag in XLA_FLAGS is left as it is. XLA aborts on flags that it does not know,
    so the flag is set only for versions of jaxlib that are known to have it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    known = jaxlib.__version__.split(".")[:2] == ["0", "10"]
    if known and _FLAG not in flags and not any(map(importlib.util.find_spec, _ACCELERATORS)):
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=".strip()
