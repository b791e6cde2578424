"""Learned edits of a frozen model, such as gates or the subspace of a patch.

The parameters are values of an edit, and the loss is computed from a run with it, so that one loop
learns any edit:

    def loss(logits, model, batch, key):
        gates = HARD_CONCRETE.draw(logits, key)
        out = mj.run(model, batch, mj.scale(S.lm.mlp.act, gates))
        return wrong(out) + 0.1 * HARD_CONCRETE.cost(logits).mean()

    logits, curve = learn(loss, start, model, batches, optax.adam(0.1))

The subspace of distributed alignment search (Geiger et al. 2024) is `mj.patch(..., basis=params)`
with params float32[D, r]: a patch orthonormalises its basis, and gradients flow through that.
Representation fine-tuning (Wu et al. 2024) is `dictionaries.reft.LoReFT`, which is its own params.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mllm_jax.numerics import precision
from mllm_jax.sharding import mesh
from mllm_jax.typing import Indexed


class Gate(NamedTuple):
    """A gate between 0 and 1 with a logit as its parameter.

    Attributes:
      draw: (logits, key) -> gates during training.
      cost: logits -> penalty of each gate, to be weighted and added to the loss.
      final: logits -> gates after training.
    """

    draw: Callable[[jax.Array, jax.Array], jax.Array]
    cost: Callable[[jax.Array], jax.Array]
    final: Callable[[jax.Array], jax.Array]


# Louizos et al. 2018, "Learning sparse neural networks through L0 regularization", section 2.2.
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1


def _stretch(gates: jax.Array) -> jax.Array:
    return jnp.clip(gates * (HIGH - LOW) + LOW, 0, 1)


def _draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    noise = jax.random.logistic(key, logits.shape, logits.dtype)
    return _stretch(jax.nn.sigmoid((noise + logits) / TEMPERATURE))


# Gates that may be exactly 0 or 1. The cost is the probability that a gate is not 0, so that costs
# sum to the expected number of open gates (L0).
HARD_CONCRETE = Gate(
    draw=_draw,
    cost=lambda logits: jax.nn.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH)),
    final=lambda logits: _stretch(jax.nn.sigmoid(logits)),
)
# No noise; the cost is the gate itself (L1).
SIGMOID = Gate(
    draw=lambda logits, key: jax.nn.sigmoid(logits), cost=jax.nn.sigmoid, final=jax.nn.sigmoid
)
GATES = {"hard_concrete": HARD_CONCRETE, "sigmoid": SIGMOID}


def learn(
    loss: Callable[[Any, Any, Any, jax.Array], jax.Array],
    start: Any,
    model: Any,
    batches: Indexed[Any],
    optimiser: optax.GradientTransformation,
    *,
    seed: int = 0,
    label: str = "learn",
) -> tuple[Any, np.ndarray]:
    """Minimise a loss over the parameters of an edit, with one step on each batch.

    Args:
      loss: (params, model, batch, key) -> a scalar. It must be pure; the model is not changed.
      start: The initial parameters, a pytree. They are trained in float32 or wider, as is the
        optimiser's state, whatever the model's dtype.
      model: The frozen model.
      batches: Pytrees of one shape, each read once, in order.
      optimiser: The optimiser.
      seed: Seed of the keys.
      label: The label of the progress bar.

    Returns:
      The trained parameters, and the loss of each step, float32[steps].

    Raises:
      FloatingPointError: A loss is not finite.
    """

    def step_on(
        params: Any, state: Any, model: Any, batch: Any, key: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, model, batch, key)
        change, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    curve = np.zeros((len(batches),), np.float32)
    with mesh.use_mesh_of(model):
        params = mesh.replicate(jax.tree.map(_widened, start))
        state = mesh.replicate(optimiser.init(params))
        update = jax.jit(step_on, out_shardings=(*map(mesh.shardings_of, (params, state)), None))
        bar = tqdm.tqdm(range(len(batches)), desc=label, leave=False, mininterval=1)
        for step in bar:
            key = jax.random.fold_in(jax.random.key(seed), step)
            params, state, value = update(params, state, model, batches[step], key)
            curve[step] = value
            bar.set_postfix(loss=f"{curve[step]:.3f}", refresh=False)
            if not np.isfinite(curve[step]):
                raise FloatingPointError(
                    f"{label}: the loss of step {step} is {curve[step]}; lower the learning rate"
                )
    return mesh.gather_to_host(params), curve


def _widened(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return precision.at_least_float32(leaf) if floats else leaf


def alignment(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosines of the principal angles of two subspaces: float64[r], largest first.

    Args:
      a: float[D, r], columns that span one subspace.
      b: float[D, r], columns that span the other.
    """
    a, b = (np.linalg.qr(np.asarray(columns, np.float64))[0] for columns in (a, b))
    return np.linalg.svd(a.T @ b, compute_uv=False)
