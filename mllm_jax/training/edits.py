"""What an edit can learn, of a frozen model: gates that open or close, or the subspace of a patch.

Parameters are the values of an edit and the loss is of a run with it, so that any edit can be
learned by the same loop:

    def loss(logits, model, batch, key):
        gates = HARD_CONCRETE.draw(logits, key)
        out = mj.run(model, batch, mj.scale(S.lm.mlp.act, gates))
        return wrong(out) + 0.1 * HARD_CONCRETE.cost(logits).mean()

    logits, curve = learn(loss, start, model, batches, optax.adam(0.1))

The subspace of distributed alignment search (Geiger et al. 2024) is `mj.patch(..., basis=params)`
with params float32[D, r]: a patch makes its basis orthonormal, and the gradient goes through that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mllm_jax.numerics import precision
from mllm_jax.sharding import mesh


class Gate(NamedTuple):
    """A gate between 0 and 1 of a parameter, its logit.

    Attributes:
        draw: (logits, key) -> gates while they are learned.
        cost: logits -> what each gate costs, to be weighed against the loss.
        settle: logits -> gates when they are learned.
    """

    draw: Callable[[jax.Array, jax.Array], jax.Array]
    cost: Callable[[jax.Array], jax.Array]
    settle: Callable[[jax.Array], jax.Array]


# Louizos et al. 2018, "Learning sparse neural networks through L0 regularization", section 2.2.
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1


def _stretch(gates: jax.Array) -> jax.Array:
    return jnp.clip(gates * (HIGH - LOW) + LOW, 0, 1)


def _draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    noise = jax.random.logistic(key, logits.shape, logits.dtype)
    return _stretch(jax.nn.sigmoid((noise + logits) / TEMPERATURE))


# Exactly 0 or 1 now and then; the cost is the probability that it is not 0, so that costs add up
# to the expected number of open gates (L0).
HARD_CONCRETE = Gate(
    draw=_draw,
    cost=lambda logits: jax.nn.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH)),
    settle=lambda logits: _stretch(jax.nn.sigmoid(logits)),
)
# No noise; the cost is the gate itself (L1).
SIGMOID = Gate(
    draw=lambda logits, key: jax.nn.sigmoid(logits), cost=jax.nn.sigmoid, settle=jax.nn.sigmoid
)
GATES = {"hard_concrete": HARD_CONCRETE, "sigmoid": SIGMOID}


def learn(
    loss: Callable[[Any, Any, Any, jax.Array], jax.Array],
    start: Any,
    model: Any,
    batches: Sequence[Any],
    optimiser: optax.GradientTransformation,
    *,
    seed: int = 0,
    label: str = "learn",
) -> tuple[Any, np.ndarray]:
    """Parameters after one step on each batch, and the loss of each step, float32[steps].

    Args:
        loss: (params, model, batch, key) -> a scalar. Pure; the model stays as it is.
        start: the first parameters, a pytree; they are float32 or better from there on, as is the
            optimiser's state, whatever the model's dtype.
        batches: pytrees of one shape, read once each in their order.
        seed: of the keys.
        label: of the progress bar.
    """

    def update(params, state, model, batch, key):
        value, slope = jax.value_and_grad(loss)(params, model, batch, key)
        change, state = optimiser.update(slope, state, params)
        return optax.apply_updates(params, change), state, value

    curve = np.zeros((len(batches),), np.float32)
    with mesh.use_mesh_of(model):
        params = mesh.replicate(jax.tree.map(_widened, start))
        state = mesh.replicate(optimiser.init(params))
        update = jax.jit(update, out_shardings=(*map(mesh.shardings_of, (params, state)), None))
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
    """float64[r]: cosines of the principal angles of two subspaces, largest first.

    Args:
        a, b: float[D, r], columns that span them.
    """
    a, b = (np.linalg.qr(np.asarray(columns, np.float64))[0] for columns in (a, b))
    return np.linalg.svd(a.T @ b, compute_uv=False)
