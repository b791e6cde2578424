"""Choose the library that multiplies matrices on a CPU.

YNNPACK, the default of current XLA versions, computes the same bits for a row whatever the other
rows are, and so for any number of lanes in a sweep. Eigen, the former default, is faster for very
many rows, as in sweeps; it is several times slower for about a hundred rows times a tied
vocabulary, as in the logit lens; and its last bits depend on the number of rows.
"""

from __future__ import annotations

import importlib.util
import os

import jaxlib

_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
_PRODUCTS = f"{_FLAG}LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def avoid_reductions() -> None:
    """Make YNNPACK compute only products, no reductions, if this process has only CPUs.

    `import mllm_jax` calls it; it has no effect after JAX has computed something.

    In jaxlib 0.10, YNNPACK returns wrong values, without an error, for sums over a product with an
    array that all lanes share, from about 120,000 elements on, such as the pullback of an RMSNorm
    with `jax.vmap` over cotangents. jaxlib 0.11 returns the correct values.
    """
    _set_flag(_PRODUCTS)


def prefer_eigen() -> None:
    """Make XLA use Eigen, if this process has only CPUs; call it before JAX computes anything."""
    _set_flag(_FLAG)


def _set_flag(flag: str) -> None:
    """Set the flag in XLA_FLAGS, unless the user has set it there.

    XLA aborts on flags that it does not know, so the flag is set only for versions of jaxlib that
    are known to have it.
    """
    known = jaxlib.__version__.split(".")[:2] == ["0", "10"]
    if not known or any(map(importlib.util.find_spec, _ACCELERATORS)):
        return
    flags = os.environ.get("XLA_FLAGS", "").split()
    others = [other for other in flags if other != _PRODUCTS]
    if not any(other.startswith(_FLAG) for other in others):
        os.environ["XLA_FLAGS"] = " ".join([*others, flag])
