"""Train dictionaries: sparse autoencoders on collected activations.

Vectors are standardised to mean 0 and variance 1, so that the loss is the share of the variance
that is not reconstructed; the returned dictionary reads the original vectors. `k` is the number of
active latents of a token in every kind:

* "topk" (Gao et al. 2024, "Scaling and evaluating sparse autoencoders"): the k largest.
* "batch_topk" (Bussmann et al. 2024): the n k largest of n tokens; after training a threshold, the
  mean of the smallest values that were kept.
* "jumprelu" (Rajamanoharan et al. 2024b): those above a threshold of each latent, which is trained
  with straight-through gradients and a penalty on (L0 / k - 1)^2.

Directions of the decoder have norm 1: gradients along them are removed, and each step ends on the
sphere. Dead latents are trained to reconstruct the residual of the others (the auxiliary loss of
Gao et al.).

    captures = {"x": mj.keep(S.lm.resid_post[14], where=tok.image)}
    batches = VectorBatches(mj.collect(captures, model, data, path)["x"], size=1024, count=2000)
    fitted = dictionaries.fit(batches, dictionaries.Recipe(latents=4096), save="checkpoint")
    mj.write_dictionary(fitted.dictionary, "sae")
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mllm_jax.arguments import require_number, require_whole
from mllm_jax.dictionaries.dictionary import Dictionary
from mllm_jax.numerics import precision
from mllm_jax.sharding import hosts, mesh
from mllm_jax.training.checkpoint import Checkpoint
from mllm_jax.training.fit import schedule
from mllm_jax.typing import Array, Float, Indexed, Int

Kind = Literal["topk", "batch_topk", "jumprelu"]
BANDWIDTH = 0.1  # of the straight-through gradients of thresholds, in deviations of a vector
START_THRESHOLD = 0.5  # of JumpReLU, in the same unit
MEMORY = 0.95  # decay of the running mean of the smallest values that BatchTopK keeps
ADAM = optax.scale_by_adam()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of the training of a dictionary.

    Attributes:
      latents: The number M of latents.
      k: The number of active latents of a token: exact for "topk", the mean for the others.
      kind: Which latents are active.
      rate: The peak learning rate of Adam; see `fit.schedule`.
      warmup: The share of the steps in which the rate, and the penalty of JumpReLU, rises.
      auxiliary: The weight of the auxiliary loss.
      dead_after: The number of tokens without activity after which a latent is dead.
      sparsity: The weight of the penalty of JumpReLU.
      seed: The seed of the first directions.
      every: The number of steps between two checkpoints.
    """

    latents: int
    k: int = 32
    kind: Kind = "batch_topk"
    rate: float = 1e-3
    warmup: float = 0.05
    auxiliary: float = 1 / 32
    dead_after: int = 20_000
    sparsity: float = 1.0
    seed: int = 0
    every: int = 200

    @property
    def exact_k(self) -> int | None:
        """The k of the dictionary; None if k is a mean."""
        return self.k if self.kind == "topk" else None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
          ValueError: A kind is not known, or a number is not finite, too small or too large.
        """
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(get_args(Kind))}")
        for name in ("latents", "dead_after", "every"):
            require_whole(name, getattr(self, name))
        require_whole("k", self.k, most=self.latents)
        require_whole("seed", self.seed, least=0)
        require_number("warmup", self.warmup, most=1)
        for name in ("rate", "auxiliary", "sparsity"):
            require_number(name, getattr(self, name))


Batches: TypeAlias = Indexed[Float[np.ndarray, "n D"]]


class Fitted(NamedTuple):
    """A trained dictionary, and each step before its update.

    Attributes:
      dictionary: The dictionary, on the host.
      unexplained: The share of the variance that is not reconstructed, float32[steps].
      active: The mean number of active latents of a token, float32[steps].
      dead: The share of latents that are dead, float32[steps].
    """

    dictionary: Dictionary
    unexplained: Float[np.ndarray, " steps"]
    active: Float[np.ndarray, " steps"]
    dead: Float[np.ndarray, " steps"]


class _Weights(NamedTuple):
    """The parameters that Adam trains, for standardised vectors; see `Dictionary`."""

    encoder: Float[Array, "D M"]
    encoder_bias: Float[Array, " M"]
    decoder: Float[Array, "M D"]
    decoder_bias: Float[Array, " D"]
    log_threshold: Float[Array, " M"]  # of JumpReLU


_LETTERS = _Weights((None, "F"), ("F",), ("F", None), (None,), ("F",))  # type: ignore[arg-type]


class _State(NamedTuple):
    """The state of the training.

    Attributes:
      weights: The weights.
      moments: The state of Adam.
      cutoff: The running mean of the smallest values that BatchTopK keeps.
      idle: The number of tokens since each latent was active.
    """

    weights: _Weights
    moments: optax.ScaleByAdamState
    cutoff: Float[Array, ""]
    idle: Int[Array, " M"]


class _Units(NamedTuple):
    """The mean of the vectors, and the deviation of their coordinates."""

    mean: Float[np.ndarray, " D"]
    deviation: float

    @classmethod
    def of(cls, vectors: Float[np.ndarray, "n D"]) -> _Units:
        wide = np.asarray(vectors, np.float64)
        mean = wide.mean(0)
        return cls(mean, float(np.sqrt(((wide - mean) ** 2).mean())))

    def remove(self, vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        return ((np.asarray(vectors, np.float64) - self.mean) / self.deviation).astype(np.float32)


def fit(
    batches: Batches,
    recipe: Recipe,
    *,
    save: str | pathlib.Path | None = None,
    restart: bool = False,
    label: str = "dictionary",
) -> Fitted:
    """Train a dictionary, with one step on each batch.

    On an active mesh latents are sharded over its axis "model", and tokens over the others.

    Args:
      batches: Vectors in random order, all batches of one shape, such as `VectorBatches`. Mean and
        variance are those of the first batch.
      recipe: The settings of the training.
      save: A folder for the checkpoint, with fingerprints of the recipe and the batches. A killed
        run continues from it and returns the same bytes.
      restart: Whether to remove an existing checkpoint.
      label: The label of the progress bar.

    Raises:
      ValueError: There is no batch, one does not have the shape [n, D] of the first, the vectors of
        the first are all equal or not finite, or `save` is damaged or holds another training.
      FloatingPointError: A loss is not finite.
      OSError: The checkpoint cannot be written.
    """
    first = _first(batches)
    units, steps = _Units.of(first), len(batches)
    settings = dataclasses.asdict(recipe) | {"every": None, "steps": steps}
    checkpoint = Checkpoint(save, restart=restart, settings=settings)
    exists = checkpoint.find()
    rest = checkpoint.resume(batches[number] for number in range(steps))
    curves = mesh.replicate(jnp.zeros((steps, 3), jnp.float32))
    state = _start(recipe, first.shape[1])
    if exists:
        state, curves = checkpoint.load((state, curves))
    curves = np.array(curves)
    bar = tqdm.tqdm(rest, desc=label, initial=checkpoint.done, total=steps, mininterval=1)
    for batch in bar:
        number = checkpoint.done
        if np.shape(batch) != first.shape:
            raise ValueError(
                f"{label}: batch {number} is {list(np.shape(batch))}, the first is "
                f"{list(first.shape)}: all batches of vectors must have one shape"
            )
        x = mesh.shard(units.remove(batch), ("B", None))
        state, measured = _step(state, x, recipe=recipe, steps=steps)
        curves[number] = measured
        _check_finite(curves[number], recipe, f"{label}: the loss of step {number}")
        bar.set_postfix(unexplained=f"{curves[number, 0]:.3f}", active=f"{curves[number, 1]:.1f}")
        checkpoint.add(batch)
        leaving = hosts.preemption_requested()
        if leaving or (number + 1) % recipe.every == 0 or number + 1 == steps:
            checkpoint.save((state, mesh.replicate(jnp.asarray(curves))))
        if leaving:
            hosts.exit_preempted(label)
    weights, cutoff = mesh.gather_to_host((state.weights, state.cutoff))
    return Fitted(_dictionary(weights, float(cutoff), units, recipe), *curves.T)


def _first(batches: Batches) -> Float[np.ndarray, "n D"]:
    """Return the first batch."""
    if not len(batches):
        raise ValueError("there is no batch of vectors to train on")
    first = np.asarray(batches[0], np.float32)
    if first.ndim != 2 or not first.size:
        raise ValueError(f"a batch of vectors is {list(first.shape)}, expected [n, D]")
    if not np.isfinite(first).all() or not (first != first[0]).any():
        raise ValueError("the vectors of the first batch are all equal, or not finite")
    return first


def _check_finite(values: Float[np.ndarray, " three"], recipe: Recipe, what: str) -> None:
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{what} is {values[0]}; lower the learning rate (now {recipe.rate})"
        )


def _start(recipe: Recipe, width: int) -> _State:
    """Return random directions, which the encoder reads and the decoder writes."""
    directions = np.random.default_rng(recipe.seed).standard_normal((recipe.latents, width))
    decoder = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
    M = recipe.latents
    weights = _Weights(
        encoder=jnp.asarray(decoder.T),
        encoder_bias=jnp.zeros(M),
        decoder=jnp.asarray(decoder),
        decoder_bias=jnp.zeros(width),
        log_threshold=jnp.full(M, math.log(START_THRESHOLD), jnp.float32),
    )
    moments = ADAM.init(weights)
    return _placed(_State(weights, moments, jnp.zeros(()), jnp.zeros(M, jnp.int32)), mesh.shard)


def _placed(state: _State, place: Callable[[Any, Any], Any]) -> _State:
    """Return a state with its latents sharded over the mesh.

    Args:
      state: The state.
      place: `mesh.shard`, or `mesh.constrain` inside of a trace.
    """

    def of(leaf: Any) -> Any:
        if isinstance(leaf, _Weights):
            return _Weights(*map(place, leaf, _LETTERS))
        return place(leaf, (None,) * np.ndim(leaf))

    moments = jax.tree.map(of, state.moments, is_leaf=lambda leaf: isinstance(leaf, _Weights))
    return _State(of(state.weights), moments, of(state.cutoff), place(state.idle, ("F",)))


def _dictionary(weights: _Weights, cutoff: float, units: _Units, recipe: Recipe) -> Dictionary:
    """Return the dictionary for vectors that are not standardised.

    With x = mean + deviation x', relu((x' - b) W + e) deviation is relu((x - mean - deviation b) W
    + deviation e): the weights are unchanged, and biases and thresholds get the unit of the
    vectors.
    """
    own = jax.tree.map(np.asarray, weights)
    bias = (units.mean + units.deviation * own.decoder_bias).astype(np.float32)
    deviation = np.float32(units.deviation)
    threshold = {
        "topk": np.zeros((), np.float32),
        "batch_topk": np.asarray(deviation * np.float32(cutoff)),
        "jumprelu": deviation * np.exp(own.log_threshold),
    }[recipe.kind]
    return Dictionary(
        encoder=own.encoder,
        encoder_bias=deviation * own.encoder_bias,
        decoder=own.decoder,
        decoder_bias=bias,
        input_bias=bias,
        threshold=threshold,
        k=recipe.exact_k,
    )


@functools.partial(jax.jit, static_argnames=("recipe", "steps"), donate_argnames="state")
def _step(
    state: _State, x: Float[Array, "n D"], *, recipe: Recipe, steps: int
) -> tuple[_State, Float[Array, " three"]]:
    """Return the next state, and the values of `Fitted` for this one."""
    dead = state.idle >= recipe.dead_after
    done, warmup = state.moments.count, round(recipe.warmup * steps)
    rate = schedule(recipe.rate, warmup, steps)(done)
    pressure = recipe.sparsity * jnp.minimum(1, (done + 1) / max(1, warmup))

    def loss(weights: _Weights) -> tuple[Array, tuple[Array, Array, Array]]:
        pre = precision.matmul(x - weights.decoder_bias, weights.encoder) + weights.encoder_bias
        latents, penalty, least = _activate(pre, weights, recipe)
        left = x - precision.matmul(latents, weights.decoder) - weights.decoder_bias
        unexplained = jnp.square(left).mean()
        auxiliary = _auxiliary(pre, dead, jax.lax.stop_gradient(left), weights.decoder)
        total = unexplained + pressure * penalty + recipe.auxiliary * auxiliary
        return total, (unexplained, latents > 0, least)

    (_, (unexplained, active, least)), gradient = jax.value_and_grad(loss, has_aux=True)(
        state.weights
    )
    along = (gradient.decoder * state.weights.decoder).sum(-1, keepdims=True)
    gradient = gradient._replace(decoder=gradient.decoder - along * state.weights.decoder)
    change, moments = ADAM.update(gradient, state.moments)
    weights = jax.tree.map(lambda weight, by: weight - rate * by, state.weights, change)
    length = jnp.linalg.norm(weights.decoder, axis=-1, keepdims=True)
    weights = weights._replace(decoder=weights.decoder / length)
    cutoff = jnp.where(done == 0, least, MEMORY * state.cutoff + (1 - MEMORY) * least)
    idle = jnp.where(active.any(0), 0, jnp.minimum(state.idle, recipe.dead_after) + len(x))
    measured = jnp.stack([unexplained, active.sum(-1).mean(), dead.mean()])
    return _placed(_State(weights, moments, cutoff, idle), mesh.constrain), measured


def _activate(
    pre: Float[Array, "n M"], weights: _Weights, recipe: Recipe
) -> tuple[Float[Array, "n M"], Float[Array, ""], Float[Array, ""]]:
    """Return latents, the penalty on their number, and the smallest value that is kept."""
    zero = jnp.zeros(())
    if recipe.kind == "jumprelu":
        threshold = jnp.exp(weights.log_threshold)
        active = _step_above(pre, threshold).sum(-1).mean()
        return _jump(jax.nn.relu(pre), threshold), jnp.square(active / recipe.k - 1), zero
    if recipe.kind == "topk":
        return jnp.where(pre >= largest(pre, recipe.k, axis=-1), jax.nn.relu(pre), 0), zero, zero
    least = largest(pre, recipe.k * len(pre), axis=None)
    return jnp.where(pre >= least, jax.nn.relu(pre), 0), zero, least.squeeze()


def _auxiliary(
    pre: Float[Array, "n M"], dead: Array, left: Float[Array, "n D"], decoder: Float[Array, "M D"]
) -> Float[Array, ""]:
    """Return the share of the residual that D / 2 dead latents do not reconstruct."""

    def of_dead() -> Array:
        among = jnp.where(dead, pre, 0)
        kept = among >= largest(among, max(1, left.shape[-1] // 2), axis=-1)
        guess = precision.matmul(jnp.where(kept, jax.nn.relu(among), 0), decoder)
        return jnp.square(left - guess).mean() / jnp.square(left).mean()

    return jax.lax.cond(dead.any(), of_dead, lambda: jnp.ones(()))


def largest(x: Float[Array, "n M"], count: int, *, axis: int | None) -> Float[Array, ...]:
    """Return the value of a rank among positive values; the smallest of them if they are fewer.

    The bits of positive floats, read as integers, are in the order of their values: the rank is
    found by bisection in 31 counts, which is faster than a sort and can be sharded over a mesh.

    Args:
      x: Values float32; only those above 0 are ranked.
      count: The rank, from 1.
      axis: The axis along which values are ranked; None for all.

    Returns:
      The value, with the axes of x; ranked axes have length 1.
    """
    bits = jax.lax.bitcast_convert_type(jax.nn.relu(jax.lax.stop_gradient(x)), jnp.int32)

    def halve(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bounds  # at least `count` values are as large as low; fewer as high
        middle = low + (high - low) // 2
        enough = (bits >= middle).sum(axis, keepdims=True) >= count
        return (jnp.where(enough, middle, low), jnp.where(enough, high, middle)), None

    low = jnp.zeros_like(bits.sum(axis, keepdims=True))
    high = jnp.full_like(low, 0x7F800000)  # infinity
    (low, _), _ = jax.lax.scan(halve, (low, high), None, length=31)
    return jax.lax.bitcast_convert_type(jnp.maximum(low, 1), jnp.float32)


@jax.custom_vjp
def _jump(x: Float[Array, "n M"], threshold: Float[Array, " M"]) -> Float[Array, "n M"]:
    """Return x where it exceeds its threshold, else 0."""
    return jnp.where(x > threshold, x, 0)


def _jump_forward(x: Array, threshold: Array) -> tuple[Array, tuple[Array, Array]]:
    return _jump(x, threshold), (x, threshold)


def _jump_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, threshold = kept
    moved = -(threshold / BANDWIDTH) * _is_near(x, threshold) * gradient
    return jnp.where(x > threshold, gradient, 0), moved.sum(0)


_jump.defvjp(_jump_forward, _jump_backward)


@jax.custom_vjp
def _step_above(x: Float[Array, "n M"], threshold: Float[Array, " M"]) -> Float[Array, "n M"]:
    """Return 1 where x exceeds its threshold, else 0."""
    return (x > threshold).astype(x.dtype)


def _step_above_forward(x: Array, threshold: Array) -> tuple[Array, tuple[Array, Array]]:
    return _step_above(x, threshold), (x, threshold)


def _step_above_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, threshold = kept
    moved = -(1 / BANDWIDTH) * _is_near(x, threshold) * gradient
    return jnp.zeros_like(x), moved.sum(0)


_step_above.defvjp(_step_above_forward, _step_above_backward)


def _is_near(x: Array, threshold: Array) -> Array:
    """Return the rectangle of the straight-through gradients."""
    return (jnp.abs(x - threshold) < BANDWIDTH / 2).astype(x.dtype)
