"""Probes: how well a classifier predicts the class from frozen features (Verma et al. 2024, 4).

Features are one vector for each picture. Probes of several seeds, and of several sites of one
width, are trained in parallel in one compiled program:

    names, ids = probe.class_ids(labels)
    train, held, test = (probe.Part(features[split], ids[split]) for split in ...)
    fitted = probe.fit(probe.AFTER, train, held, test, classes=len(names), seeds=(0, 1, 2))
    fitted.predicted                                     # int32[seeds, N], on the test pictures

BEFORE and AFTER are the paper's probes of the two sides of the projection. They differ in depth and
width, so that their results differ for more reasons than the projection; `matched` gives both sides
the same probe on the same number of features, and LINEAR is a probe without hidden layers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mllm_jax.analysis import checks
from mllm_jax.numerics import precision

AT_ONCE = 50_000_000  # largest number of parameters of the probes that are trained in parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A multilayer perceptron with ReLU, its inputs, and how it is trained, by Adam.

    Attributes:
      hidden: Widths of the hidden layers; a linear probe has none.
      standard: Whether features are standardised, by the mean and standard deviation of the
        training examples.
      components: Number of principal components that it reads; None reads the features.
      rate: Learning rate.
      batch: Number of examples of a step.
      epochs: Largest number of epochs.
      patience: Number of epochs without a lower held-out loss after which training ends; the
        weights of the lowest loss are used. None trains all epochs and uses the last weights.
      least: Smallest decrease of the held-out loss that counts, nats.
    """

    hidden: tuple[int, ...] = ()
    standard: bool = True
    components: int | None = None
    rate: float = 1e-4
    batch: int = 128
    epochs: int = 200
    patience: int | None = 10
    least: float = 0.0

    def widths(self, features: int, classes: int) -> tuple[int, ...]:
        """Return the widths from the input to the output, for features of a width."""
        return min(features, self.components or features), *self.hidden, classes

    def parameters(self, features: int, classes: int) -> int:
        """Count its parameters."""
        return sum((n + 1) * m for n, m in itertools.pairwise(self.widths(features, classes)))


# The paper's appendix: features of 1024 and 4096 numbers; Adam 1e-4, batch 128, early stopping.
BEFORE = Probe(hidden=(2000, 3600, 1024, 600, 256), standard=False)
AFTER = Probe(hidden=(2048, 1536, 1024, 512, 256), standard=False)
LINEAR = Probe(rate=1e-2)


def released(probe: Probe) -> Probe:
    """Return the probe as trained in the paper's released code: 100 epochs, no early stopping."""
    return dataclasses.replace(probe, rate=1e-3, batch=32, epochs=100, patience=None)


def matched(*widths: int, hidden: Sequence[int] = (256,)) -> Probe:
    """Return one probe for sites of several widths, a control that the paper lacks.

    The number of principal components that it reads of each site is the width of the narrowest.
    """
    return Probe(hidden=tuple(hidden), components=min(widths), rate=1e-3)


class Part(NamedTuple):
    """The features and labels of some examples.

    Attributes:
      features: float[N, W], or float[S, N, W] of several sites.
      labels: int[N], 0 to C - 1.
    """

    features: np.ndarray
    labels: np.ndarray


class Fitted(NamedTuple):
    """Predictions of probes with R seeds. With several sites, arrays have a leading site axis.

    Attributes:
      predicted: int32[R, N], the class of each test example.
      epochs: int32[R], the number of epochs after which the weights were taken.
      losses: float32[R, epochs], nats per held-out example; nan after the end of training.
    """

    predicted: np.ndarray | jax.Array
    epochs: np.ndarray | jax.Array
    losses: np.ndarray | jax.Array


def class_ids(labels: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes in alphabetic order, and the index of each label among them, int32[N]."""
    names = tuple(sorted(set(labels)))
    place = {name: number for number, name in enumerate(names)}
    return names, np.array([place[label] for label in labels], np.int32)


def hold_out(labels: np.ndarray, share: float = 0.2, *, seed: int = 0) -> np.ndarray:
    """Draw a share of each class, bool[N]: at least one example of a class with two or more."""
    if not 0 < share < 1:
        raise ValueError(f"share={share} lies outside (0, 1)")
    labels = np.asarray(labels)
    generator, held = np.random.default_rng(seed), np.zeros(labels.shape, bool)
    for label in np.unique(labels):
        own = generator.permutation(np.flatnonzero(labels == label))
        held[own[: min(max(1, round(share * len(own))), len(own) - 1)]] = True
    return held


def fit(
    probe: Probe,
    train: Part,
    held: Part,
    test: Part,
    *,
    classes: int,
    seeds: Sequence[int] = (0, 1, 2),
) -> Fitted:
    """Train a probe with each seed on each site.

    Args:
      probe: The architecture and how it is trained.
      train: The examples to learn from.
      held: The examples whose loss decides when to stop.
      test: The examples to classify.
      classes: Number of classes, C.
      seeds: Seeds of the initial weights and of the order of the examples.

    Returns:
      The predictions for the test examples; equal for equal arguments.

    Raises:
      ValueError: Features and labels do not match, or are not finite.
      FloatingPointError: The held-out loss is not finite.
    """
    parts = [_checked(part, name, classes) for part, name in
             zip((train, held, test), ("train", "held", "test"), strict=True)]  # fmt: skip
    if not len(seeds):
        raise ValueError("seeds is empty: a probe needs one or more")
    several = np.ndim(train.features) == 3
    sites = prepare(probe, *(part.features for part in parts))
    lanes = np.array(list(itertools.product(range(len(sites[0])), seeds)), np.int32)
    count, size = len(lanes), probe.parameters(sites[0].shape[-1], classes)
    turns = -(-count // max(1, AT_ONCE // size))
    fill = np.repeat(lanes[-1:], -count % turns, 0)
    fitted = _fit(
        probe,
        *(Part(x, part.labels) for x, part in zip(sites, parts, strict=True)),
        np.concatenate([lanes, fill]).reshape(turns, -1, 2),
        classes=classes,
    )
    shape = (len(sites[0]), len(seeds)) if several else (len(seeds),)
    rows = [np.asarray(a).reshape(-1, *a.shape[2:])[:count] for a in fitted]
    results = Fitted(*(a.reshape(*shape, *a.shape[1:]) for a in rows))
    last = np.maximum(results.epochs, 1) - 1  # none, if the first loss is not finite
    if not np.isfinite(np.take_along_axis(results.losses, last[..., None], -1)).all():
        raise FloatingPointError(
            f"the held-out loss of a probe is not finite after {last.max() + 1} of its epochs; "
            f"lower its rate (now {probe.rate}) or standardise its features"
        )
    return results


def prepare(probe: Probe, train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Standardise features and project them on principal components, as a probe requires.

    A feature that does not vary in `train`, beyond rounding in float32, is only centred.

    Args:
      probe: Whether to standardise, and the number of components.
      train: float[S, N, W], from which means, deviations and components are computed.
      *others: float[S, N, W], other examples of the same sites.

    Returns:
      float32[S, N, W] of each.
    """
    parts = [_float32(x) for x in (train, *others)]
    if probe.components is not None and parts[0].shape[1] < 2:
        raise ValueError("principal components need two training examples or more, got one")
    if probe.standard:
        mean = parts[0].mean(1, keepdims=True, dtype=np.float64)
        deviation = parts[0].std(1, keepdims=True, dtype=np.float64)
        deviation[deviation <= np.finfo(np.float32).eps * np.abs(mean)] = 1
        parts = [((x - mean) / deviation).astype(np.float32) for x in parts]
    if probe.components is None:
        return parts
    mean = parts[0].mean(1, keepdims=True, dtype=np.float64)
    count = min(probe.components, parts[0].shape[1] - 1, parts[0].shape[2])
    axes = np.linalg.svd(parts[0] - mean, full_matrices=False)[2][:, :count].swapaxes(1, 2)
    return [((x - mean) @ axes).astype(np.float32) for x in parts]


def _float32(features: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        features = checks.numbers(features, "features").astype(np.float32)
    if not np.isfinite(features).all():
        checks.finite(features, "features")  # says where
    return features


def start(widths: Sequence[int], key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Draw initial weights [n, m] and biases [m] with the distribution of PyTorch's nn.Linear."""
    params = []
    for n, m in itertools.pairwise(widths):
        key, kernel, bias = jax.random.split(key, 3)
        draw = functools.partial(jax.random.uniform, minval=-(n**-0.5), maxval=n**-0.5)
        params.append((draw(kernel, (n, m)), draw(bias, (m,))))
    return params


def logits(params: Sequence[tuple[Any, Any]], x: jax.Array) -> jax.Array:
    """Compute the logits float32[N, C] of features float32[N, W]."""
    *first, (kernel, bias) = params
    for weight, offset in first:
        x = jax.nn.relu(precision.matmul(x, weight) + offset)
    return precision.matmul(x, kernel) + bias


@functools.partial(jax.jit, static_argnames=("probe", "classes"))
def _fit(
    probe: Probe, train: Part, held: Part, test: Part, lanes: jax.Array, *, classes: int
) -> Fitted:
    """Train lanes int32[turns, lanes, 2] of (site, seed), those of a turn in parallel."""

    def turn(lanes: jax.Array) -> Fitted:
        return _train(probe, classes, train, held, test, lanes[:, 0], lanes[:, 1])

    return jax.lax.map(turn, lanes)


class _State(NamedTuple):
    """The training state of one probe: its weights, and those of the lowest held-out loss."""

    params: Any
    adam: Any
    best: Any
    taken: Any
    losses: Any


def _loss(params: Any, x: Any, labels: Any, weight: Any) -> jax.Array:
    """Return the mean cross-entropy of examples, by their weights."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels)
    return (nll * weight).sum() / weight.sum()


def _is_training(probe: Probe, now: _State, number: jax.Array) -> jax.Array:
    """Return whether a probe goes on after `number` epochs."""
    is_patient = probe.patience is None or number - now.taken < probe.patience
    return (number < probe.epochs) & is_patient


def _train(
    probe: Probe,
    classes: int,
    train: Part,
    held: Part,
    test: Part,
    sites: jax.Array,
    seeds: jax.Array,
) -> Fitted:
    """Train probes in parallel until all have stopped early.

    A probe that has stopped continues with the others, but keeps its best weights.
    """
    N, width = train.features.shape[1:]
    batch = min(probe.batch, N)
    steps = -(-N // batch)
    weight = (np.arange(steps * batch) < N).astype(np.float32).reshape(steps, batch)
    adam = optax.adam(probe.rate)

    def begin(key: jax.Array) -> _State:
        params = start((width, *probe.hidden, classes), key)
        losses = jnp.full((probe.epochs,), jnp.nan)
        return _State(params, adam.init(params), params, jnp.int32(0), losses)

    def epoch(now: _State, number: jax.Array, site: jax.Array, key: jax.Array) -> _State:
        def step(carry: Any, drawn: Any) -> tuple[Any, None]:
            params, state = carry
            at, weight = drawn
            gradient = jax.grad(_loss)(params, train.features[site, at], train.labels[at], weight)
            change, state = adam.update(gradient, state)
            return (optax.apply_updates(params, change), state), None

        order = jax.random.permutation(jax.random.fold_in(key, number), N)
        at = jnp.pad(order, (0, steps * batch - N)).reshape(steps, batch)
        (params, state), _ = jax.lax.scan(step, (now.params, now.adam), (at, weight))
        value = _loss(params, held.features[site], held.labels, jnp.ones(held.labels.shape))
        lowest = jnp.nanmin(now.losses, initial=jnp.inf)
        lower = (value < lowest - probe.least) | (probe.patience is None)
        active = _is_training(probe, now, number)
        return _State(
            params,
            state,
            jax.tree.map(lambda new, old: jnp.where(active & lower, new, old), params, now.best),
            jnp.where(active & lower, number + 1, now.taken),
            now.losses.at[number].set(jnp.where(active, value, jnp.nan)),
        )

    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
    every = jax.vmap(epoch, (0, None, 0, 0))
    is_training = functools.partial(_is_training, probe)
    _, end = jax.lax.while_loop(
        lambda carry: jax.vmap(is_training, (0, None))(carry[1], carry[0]).any(),
        lambda carry: (carry[0] + 1, every(carry[1], carry[0], sites, keys[:, 1])),
        (jnp.int32(0), jax.vmap(begin)(keys[:, 0])),
    )
    predicted = jax.vmap(logits)(end.best, test.features[sites]).argmax(-1).astype(jnp.int32)
    return Fitted(predicted, end.taken, end.losses)


def _checked(part: Part, name: str, classes: int) -> Part:
    features, labels = np.asarray(part.features), np.asarray(part.labels)
    if features.ndim not in (2, 3) or features.shape[-2] != len(labels) or not len(labels):
        raise ValueError(
            f"{name}: features must be [N, W] or [S, N, W] of the N labels, got "
            f"{features.shape} and {labels.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or not (labels >= 0).all():
        raise ValueError(f"{name}: labels must be class ids from 0 (see class_ids)")
    if (labels >= classes).any():
        raise ValueError(f"{name}: a label is {labels.max()}, but classes={classes}")
    if not np.isfinite(features).all():
        where = np.argwhere(~np.isfinite(features))[0].tolist()
        raise ValueError(f"{name}: features{where} is not finite")
    sites = features if features.ndim == 3 else features[None]
    return Part(sites, labels.astype(np.int32))
