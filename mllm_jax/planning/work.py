"""Count the matrix products of a program before it is compiled, with the trips of its loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def flops(fn: Callable[..., Any], *args: Any, unknown: int = 1, **static: Any) -> float:
    """Count the operations of matrix products; an addition and a multiplication are two.

    For a conditional, the branch with the most operations is counted.

    Args:
      fn: The function.
      *args: Its arguments, as arrays or shapes.
      unknown: The number of trips of a loop whose length is data.
      **static: Its static arguments.
    """
    return _count(jax.make_jaxpr(lambda *a: fn(*a, **static))(*args).jaxpr, unknown)


def _count(jaxpr: Any, unknown: int) -> float:
    return sum(_equation(equation, unknown) for equation in jaxpr.eqns)


def _equation(equation: Any, unknown: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return (
            2
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(left[axis] for axis in contracting)
        )
    if name == "cond":
        return max(_count(branch.jaxpr, unknown) for branch in params["branches"])
    inside = sum(_count(jaxpr, unknown) for jaxpr in _jaxprs(params))
    if name == "scan":
        return inside * params["length"]
    if name == "while":
        return inside * unknown
    if name == "shard_map":
        axes = params["newly_manual_axes"]
        return inside * math.prod(params["mesh"].shape[axis] for axis in axes)
    return inside


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for name, value in params.items():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and not name.startswith(("jvp", "fwd", "bwd")):
            yield inner
