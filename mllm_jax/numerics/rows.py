"""Compute a batch row by row on CPUs, so that intermediate arrays stay in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mllm_jax.sharding import mesh

MAX_ELEMENTS_AT_ONCE = 2**20  # intermediate elements above which a CPU takes one row at a time


def map_rows_on_cpu(fn: Callable[..., Any], *batch: Any, num_elements: int) -> Any:
    """Compute fn(*batch) for a function in which the rows of a batch do not interact.

    Accelerators compute all rows at once, and so does a CPU if there are few intermediate elements.

    Args:
      fn: The function; its arguments and results have a leading axis B.
      *batch: Pytrees of arrays with a leading axis B.
      num_elements: The number of intermediate elements of all rows together.
    """
    # On a mesh rows may be on different devices.
    if num_elements <= MAX_ELEMENTS_AT_ONCE or mesh.is_active():
        return fn(*batch)

    def in_turn(*batch):
        def compute_row(row):
            out = fn(*jax.tree.map(lambda a: a[None], row))
            return jax.tree.map(lambda a: a[0], out)

        return jax.lax.map(compute_row, batch)

    return jax.lax.platform_dependent(*batch, cpu=in_turn, default=fn)
