"""Search for the smallest slice, or the largest batch, that fits."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.planning.chips import Slice
from mllm_jax.planning.plan import Plan, plan
from mllm_jax.planning.programs import Size

MAX_COMPILATIONS = 4  # in the search for the largest number that fits
MAX_GROWTH = 16  # between two compilations, where memory has hardly grown so far
USABLE = 0.98  # the fraction of a chip's memory that is not the system's


def smallest_topology(
    model: MultimodalModel | MultimodalConfig,
    batch: Size | None = None,
    *,
    topology: str,
    **options: Any,
) -> Plan | None:
    """Plan on the smallest slice that fits, among those at least as large as `topology`.

    Args:
      model: As in `plan`.
      batch: As in `plan`.
      topology: The slice to start from.
      **options: Further arguments of `plan`.

    Returns:
      The plan; None if no slice fits. Without a compiler, the plan on the first slice that is not
      known to be too small.
    """
    for larger in Slice.parse(topology).larger():
        candidate = plan(model, batch, topology=str(larger), **options)
        if candidate.fits is not False:
            return candidate
    return None


def largest_that_fits(
    field: Literal["rows", "lanes"],
    model: MultimodalModel | MultimodalConfig,
    batch: Size | None = None,
    **options: Any,
) -> tuple[int, Plan]:
    """Find the largest number of rows or lanes of a data shard that fits.

    Memory is extrapolated linearly from compiled plans of the given number and of twice that
    number. The prediction is compiled, and corrected if it does not fit.

    Args:
      field: "rows" or "lanes".
      model: As in `plan`.
      batch: As in `plan`.
      **options: Further arguments of `plan`.

    Returns:
      The number and its plan. A larger number may fit, because memory grows in steps.

    Raises:
      ValueError: The given number does not fit, or there is no compiler.
    """
    batch = batch or Size()

    def plan_for(number: int) -> Plan:
        sizes: dict[str, Any] = {field: number}
        return plan(model, dataclasses.replace(batch, **sizes), **options)

    few = getattr(batch, field)
    best, next_ = plan_for(few), plan_for(2 * few)
    if not best.fits:
        reason = "there is no compiler" if best.fits is None else f"{few} {field} do not fit"
        raise ValueError(f"the largest {field}: {reason}")
    failed = None
    for _ in range(MAX_COMPILATIONS):
        number = _per_shard(next_, field)
        slope = (next_.total - best.total) / (number - few)
        if next_.fits:
            best, few = next_, number
        else:
            failed = number
        assert best.capacity is not None  # it fits
        most = few + int((best.capacity * USABLE - best.total) / max(slope, 1))
        most = min(most, MAX_GROWTH * number)
        most = most if failed is None else min(most, failed - 1)
        if most <= few:
            break
        next_ = plan_for(most)
    return few, best


def _per_shard(planned: Plan, field: str) -> int:
    """Return the rows or lanes of a data shard."""
    if planned.study == "sweep":
        return planned.rows if field == "rows" else planned.lanes // planned.data
    return getattr(planned, field) // (planned.data * planned.fsdp)
