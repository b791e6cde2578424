"""Attribution: how much of a metric goes through each gate, all gates in one backward pass.

A gate multiplies a tensor and is 1 in the model as it is: `mj.scale(S.lm.mlp.act, gates)` with
gates float32[L, F], `mj.scale(S.lm.attn.heads, gates)` with [L, N]. An attribution estimates what
of the metric is lost when a gate is closed:

    def metric(gates):
        return answer(mj.run(model, batch, mj.scale(S.lm.mlp.act, gates)))

    found = attribution.integrated(metric, np.ones((L, F), np.float32), steps=8)

Gates may be any pytree, such as a dictionary of sites. All of it runs inside or outside `jax.jit`;
outside, a metric or a slope that is not finite is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.analysis import checks


class Attribution(NamedTuple):
    """What goes through each gate.

    Attributes:
        values: in the shapes of the gates, in units of the metric.
        metric: float[], with the gates as they were given.
    """

    values: Any
    metric: Any


def first_order(metric: Callable[[Any], jax.Array], gates: Any) -> Attribution:
    """gate * d metric / d gate: the change from closing a gate alone, to first order.

    Mozer and Smolensky 1988, "Skeletonization"; as attribution patching, Nanda 2023.

    Args:
        metric: of the gates; a scalar.
        gates: arrays.
    """
    value, slope = jax.value_and_grad(metric)(gates)
    return _checked(Attribution(jax.tree.map(jnp.multiply, gates, slope), value))


def integrated(metric: Callable[[Any], jax.Array], gates: Any, *, steps: int) -> Attribution:
    """Integrated gradients from closed gates: gate * the mean slope on the way from 0 to the gates.

    Sundararajan et al. 2017, equation 1, by the midpoint rule. The values of all gates add up to
    metric(gates) - metric(0), as nearly as the steps are fine.

    Args:
        metric: of the gates; a scalar.
        gates: arrays.
        steps: gradients that are averaged; they are computed one after the other.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: integrated gradients need one or more")

    def add(total, share):
        slope = jax.grad(metric)(jax.tree.map(lambda gate: gate * share, gates))
        return jax.tree.map(jnp.add, total, slope), None

    shares = (np.arange(steps) + 0.5) / steps
    gates = jax.tree.map(jnp.asarray, gates)
    dtype = jnp.result_type(*jax.tree.leaves(gates))
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, gates), jnp.asarray(shares, dtype))
    values = jax.tree.map(lambda gate, slope: gate * slope / steps, gates, total)
    return _checked(Attribution(values, metric(gates)))


def _checked(found: Attribution) -> Attribution:
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if not isinstance(leaf, jax.core.Tracer):
            checks.finite(leaf, f"attribution{jax.tree_util.keystr(path)}")
    return found


def top(values: np.ndarray, count: int) -> np.ndarray:
    """int64[count, axes]: where the largest values are, largest first; ties in order of place.

    All of them where there are no more than `count`.
    """
    values = checks.finite(values, "values")
    if count < 0:
        raise ValueError(f"count={count} is below 0")
    order = np.argsort(-values, axis=None, kind="stable")[:count]
    return np.stack(np.unravel_index(order, values.shape), -1)


def top_mask(values: np.ndarray, count: int) -> np.ndarray:
    """bool, in the shape of values: the `count` largest, an address of an edit."""
    mask = np.zeros(np.shape(values), bool)
    mask[tuple(top(values, count).T)] = True
    return mask
