"""Attribution: how much of a metric depends on each gate, all gates in one backward pass.

A gate multiplies a tensor and is 1 in the unedited model: `mj.scale(S.lm.mlp.act, gates)` with
gates float32[L, F], `mj.scale(S.lm.attn.heads, gates)` with [L, N]. An attribution estimates how
much the metric decreases when a gate is closed:

    def metric(gates):
        return answer(mj.run(model, batch, mj.scale(S.lm.mlp.act, gates)))

    attributed = attribution.integrated(metric, np.ones((L, F), np.float32), steps=8)

A closed gate may also substitute another value than 0 (`interpolate`): in `patching` the value of
the tensor in another pass, in `picture_attribution` the mean of the picture.
Gates may be any pytree, such as a dictionary of sites. All functions work inside and outside of
`jax.jit`; outside, a metric or gradient that is not finite raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.analysis import checks
from mllm_jax.numerics.precision import at_least_float32


class Attribution(NamedTuple):
    """The attribution of a metric to gates.

    Attributes:
      values: Attribution of each gate, in the units of the metric.
      metric: float[], the metric with the given gates.
    """

    values: Any
    metric: Any


def interpolate(x: jax.Array, gate: jax.Array, closed: jax.Array) -> jax.Array:
    """Interpolate between `closed`, at gate 0, and x, at gate 1: a function for `call`.

    It is computed in float32 or better: the derivative with respect to the gate is a difference of
    two sums, of which a narrower dtype leaves little where x and `closed` are nearly equal.
    """
    x, gate = at_least_float32(x), at_least_float32(gate)
    return gate * x + (1 - gate) * closed


def first_order(metric: Callable[[Any], jax.Array], gates: Any) -> Attribution:
    """Compute gate * d metric / d gate: the effect of closing each gate alone, to first order.

    Mozer and Smolensky 1988, "Skeletonization"; as attribution patching, Nanda 2023.

    Args:
      metric: gates -> a scalar.
      gates: A pytree of arrays.
    """
    value, gradient = jax.value_and_grad(metric)(gates)
    return _checked(Attribution(jax.tree.map(jnp.multiply, gates, gradient), value))


def integrated(metric: Callable[[Any], jax.Array], gates: Any, *, steps: int) -> Attribution:
    """Compute integrated gradients: gate * the mean gradient along the line from 0 to the gates.

    Sundararajan et al. 2017, equation 1, by the midpoint rule. The values of all gates sum to
    metric(gates) - metric(0) up to the error of that rule.

    Args:
      metric: gates -> a scalar.
      gates: A pytree of arrays.
      steps: Number of gradients that are averaged; they are computed in sequence.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: integrated gradients need one or more")

    def gradient_at(share: jax.Array) -> Any:
        return jax.grad(metric)(jax.tree.map(lambda gate: gate * share, gates))

    gates = jax.tree.map(jnp.asarray, gates)
    gradient = mean_along_line(gradient_at, jax.tree.map(jnp.zeros_like, gates), steps)
    return _checked(Attribution(jax.tree.map(jnp.multiply, gates, gradient), metric(gates)))


def mean_along_line(function: Callable[[jax.Array], Any], zeros: Any, steps: int) -> Any:
    """Return the mean of a function of the shares from 0 to 1, by the midpoint rule.

    Args:
      function: share -> a pytree of arrays.
      zeros: Zeros of the shapes and dtypes that it returns.
      steps: Number of shares; their values are computed in sequence.
    """

    def add(total: Any, share: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(share)), None

    dtype = jnp.result_type(*jax.tree.leaves(zeros))
    total, _ = jax.lax.scan(add, zeros, jnp.asarray((np.arange(steps) + 0.5) / steps, dtype))
    return jax.tree.map(lambda x: x / steps, total)


def _checked(attribution: Attribution) -> Attribution:
    for path, leaf in jax.tree_util.tree_leaves_with_path(attribution):
        if not isinstance(leaf, jax.core.Tracer):
            checks.finite(leaf, f"attribution{jax.tree_util.keystr(path)}")
    return attribution


def top(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the largest values, int64[count, axes], largest first.

    Equal values are in the order of their indices. Fewer values than `count` are all returned.
    """
    values = checks.finite(values, "values")
    if count < 0:
        raise ValueError(f"count={count} is below 0")
    order = np.argsort(-values, axis=None, kind="stable")[:count]
    return np.stack(np.unravel_index(order, values.shape), -1)


def top_mask(values: np.ndarray, count: int) -> np.ndarray:
    """Return a mask of the `count` largest values: an address for an edit."""
    mask = np.zeros(np.shape(values), bool)
    mask[tuple(top(values, count).T)] = True
    return mask
