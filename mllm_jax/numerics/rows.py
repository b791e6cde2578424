"""A batch row by row, so that what comes up on the way stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mllm_jax.sharding import mesh

AT_ONCE = 2**20  # numbers that come up on the way: above, a CPU takes one row after the other


def map_rows_on_cpu(fn: Callable, *batch: Any, num_elements: int) -> Any:
    """fn(*batch), where rows do not meet: arrays lead with B, those that come out as well.

    Accelerators take all rows at once, and so does a CPU where little comes up on the way.

    Args:
      batch: arrays, or trees of them.
      num_elements: how many numbers come up on the way for all rows.
    """
    if num_elements <= AT_ONCE or mesh.inside_mesh():  # rows may lie on different devices
        return fn(*batch)

    def in_turn(*batch):
        def one(row):
            out = fn(*jax.tree.map(lambda a: a[None], row))
            return jax.tree.map(lambda a: a[0], out)

        return jax.lax.map(one, batch)

    return jax.lax.platform_dependent(*batch, cpu=in_turn, default=fn)
