"""Search for the smallest slice, or the largest batch, that fits."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.planning.chips import Slice
from mllm_jax.planning.plan import Plan, plan
from mllm_jax.planning.programs import Size

MAX_COMPILATIONS = 6  # in the search for the largest number that fits, after the first one
MAX_GROWTH = 16  # from one number to the next, where memory has hardly grown so far
FULL = 0.95  # the fraction of the usable memory above which no larger number is searched for
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

    Memory is extrapolated linearly: first from the weights and the given number, then from the
    largest number known to fit and the number compiled last. The prediction is compiled, until what
    fits uses 95 % of the memory or no larger number is expected to fit.

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
    best = plan_for(few)
    if not best.fits:
        reason = "there is no compiler" if best.fits is None else f"{few} {field} do not fit"
        raise ValueError(f"the largest {field}: {reason}")
    assert best.capacity is not None  # it fits
    usable = best.capacity * USABLE
    slope, failed = (best.total - best.bytes["weights"]) / few, None
    for _ in range(MAX_COMPILATIONS):
        most = few + int((usable - best.total) / max(slope, 1))
        most = min(most, MAX_GROWTH * few, most if failed is None else failed - 1)
        if best.total > FULL * usable or most <= few:
            break
        tried = plan_for(most)
        number = _per_shard(tried, field)
        slope = (tried.total - best.total) / (number - few)
        if tried.fits:
            best, few = tried, number
        else:
            failed = number
    return few, best


def _per_shard(planned: Plan, field: str) -> int:
    """Return the rows or lanes of a data shard."""
    if planned.study == "sweep":
        return planned.rows if field == "rows" else planned.lanes // planned.data
    return getattr(planned, field) // (planned.data * planned.fsdp)
