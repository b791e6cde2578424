"""Probes: how well a classifier reads the class from frozen features (Verma et al. 2024, 4).

Features are one vector a picture. Several seeds, and several sites of one width, are trained in
one compiled program, side by side:

    names, ids = probe.class_ids(labels)
    train, held, test = (probe.Part(features[split], ids[split]) for split in ...)
    found = probe.fit(probe.AFTER, train, held, test, classes=len(names), seeds=(0, 1, 2))
    found.predicted                                      # int32[seeds, N], on the test pictures

BEFORE and AFTER are the paper's probes of the two sides of the projection. They differ in depth and
width, so that their figures differ for more reasons than the projection; `matched` reads both sides
through the same probe on as many numbers, and LINEAR asks what can be read without any depth.
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

AT_ONCE = 50_000_000  # parameters of the probes that are trained side by side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A multilayer perceptron with ReLU, its inputs, and how it is trained, by Adam.

    Attributes:
        hidden: widths between the features and the classes; none is a linear probe.
        standard: whether features are standardised, by the mean and deviation of those for
            training.
        components: how many principal components of the features it reads; None is the features.
        rate: learning rate.
        batch: examples of a step.
        epochs: at most.
        patience: epochs without a lower loss on held-out examples that end the training; the
            weights of the lowest are used. None never stops, and uses the last.
        least: nats by which a loss must be lower to count.
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
        """From the input to the output, of features of a width."""
        return min(features, self.components or features), *self.hidden, classes

    def parameters(self, features: int, classes: int) -> int:
        """How many numbers it learns."""
        return sum((n + 1) * m for n, m in itertools.pairwise(self.widths(features, classes)))


# The paper, appendix: 1024 and 4096 wide are its features; Adam 1e-4, batch 128, early stopping.
BEFORE = Probe(hidden=(2000, 3600, 1024, 600, 256), standard=False)
AFTER = Probe(hidden=(2048, 1536, 1024, 512, 256), standard=False)
LINEAR = Probe(rate=1e-2)


def released(probe: Probe) -> Probe:
    """The same trained as the paper's released code does it: 100 epochs, none held out."""
    return dataclasses.replace(probe, rate=1e-3, batch=32, epochs=100, patience=None)


def matched(*widths: int, hidden: Sequence[int] = (256,)) -> Probe:
    """The control that the paper lacks: one probe for sites of several widths.

    Each site is read through as many principal components as the narrowest has numbers.
    """
    return Probe(hidden=tuple(hidden), components=min(widths), rate=1e-3)


class Part(NamedTuple):
    """Examples.

    Attributes:
        features: float[N, W], or float[S, N, W] of several sites.
        labels: int[N], 0 to C - 1.
    """

    features: np.ndarray
    labels: np.ndarray


class Fitted(NamedTuple):
    """What probes say of the test examples, R seeds. With several sites, their axis leads.

    Attributes:
        predicted: int32[R, N].
        epochs: int32[R], after how many the weights were taken.
        losses: float32[R, epochs], nats per held-out example; nan where training had ended.
    """

    predicted: np.ndarray
    epochs: np.ndarray
    losses: np.ndarray


def class_ids(labels: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes in alphabetic order, and int32[N], the place of each label among them."""
    names = tuple(sorted(set(labels)))
    place = {name: number for number, name in enumerate(names)}
    return names, np.array([place[label] for label in labels], np.int32)


def hold_out(labels: np.ndarray, share: float = 0.2, *, seed: int = 0) -> np.ndarray:
    """bool[N]: a share of each class, drawn; one example at least of a class with two."""
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
    """Trains a probe with each seed on each site.

    Args:
        train: to learn from. held: decides when to stop. test: is classified, never learned from.
        classes: C.
        seeds: of the first weights and of the order of the examples.

    Returns:
        What they say; equal for equal arguments.
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
    found = Fitted(*(a.reshape(*shape, *a.shape[1:]) for a in rows))
    if not np.isfinite(found.losses[..., 0]).all():
        raise FloatingPointError(
            f"the held-out loss of a probe is not finite after one epoch; lower its rate (now "
            f"{probe.rate}) or standardise its features"
        )
    return found


def prepare(probe: Probe, train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Features as a probe reads them: float32[S, N, W] each.

    A feature that does not vary in `train`, but for what float32 rounds, is centred alone.

    Args:
        train: float[S, N, W], which means, deviations and components are of.
        others: of the same sites.
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
    """First weights [n, m] and biases [m], distributed as those of PyTorch's nn.Linear."""
    params = []
    for n, m in itertools.pairwise(widths):
        key, kernel, bias = jax.random.split(key, 3)
        draw = functools.partial(jax.random.uniform, minval=-(n**-0.5), maxval=n**-0.5)
        params.append((draw(kernel, (n, m)), draw(bias, (m,))))
    return params


def logits(params: Sequence[tuple[Any, Any]], x: jax.Array) -> jax.Array:
    """float32[N, C] of features float32[N, W]."""
    *first, (kernel, bias) = params
    for weight, offset in first:
        x = jax.nn.relu(precision.matmul(x, weight) + offset)
    return precision.matmul(x, kernel) + bias


@functools.partial(jax.jit, static_argnames=("probe", "classes"))
def _fit(probe: Probe, train: Part, held: Part, test: Part, lanes, *, classes) -> Fitted:
    """Of lanes int32[turns, lanes, 2], (site, seed) each, side by side in each turn."""

    def turn(lanes):
        return _train(probe, classes, train, held, test, lanes[:, 0], lanes[:, 1])

    return jax.lax.map(turn, lanes)


class _State(NamedTuple):
    """Of one probe: its weights now, and those of the lowest held-out loss."""

    params: Any
    adam: Any
    best: Any
    taken: Any
    losses: Any


def _train(probe: Probe, classes: int, train: Part, held: Part, test: Part, sites, seeds):
    """Probes side by side, until the held-out loss of none has fallen for a while.

    One that is done earlier learns on with the others, but its best weights stay.
    """
    N, width = train.features.shape[1:]
    batch = min(probe.batch, N)
    steps = -(-N // batch)
    weight = (np.arange(steps * batch) < N).astype(np.float32).reshape(steps, batch)
    adam = optax.adam(probe.rate)

    def loss(params, x, labels, weight):
        wrong = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels)
        return (wrong * weight).sum() / weight.sum()

    def begin(key) -> _State:
        params = start((width, *probe.hidden, classes), key)
        losses = jnp.full((probe.epochs,), jnp.nan)
        return _State(params, adam.init(params), params, jnp.int32(0), losses)

    def going(now: _State, number):
        waiting = probe.patience is None or number - now.taken < probe.patience
        return (number < probe.epochs) & waiting

    def epoch(now: _State, number, site, key) -> _State:
        def step(carry, drawn):
            params, state = carry
            at, weight = drawn
            slope = jax.grad(loss)(params, train.features[site, at], train.labels[at], weight)
            change, state = adam.update(slope, state)
            return (optax.apply_updates(params, change), state), None

        order = jax.random.permutation(jax.random.fold_in(key, number), N)
        at = jnp.pad(order, (0, steps * batch - N)).reshape(steps, batch)
        (params, state), _ = jax.lax.scan(step, (now.params, now.adam), (at, weight))
        value = loss(params, held.features[site], held.labels, jnp.ones(held.labels.shape))
        lowest = jnp.nanmin(now.losses, initial=jnp.inf)
        lower = (value < lowest - probe.least) | (probe.patience is None)
        active = going(now, number)
        return _State(
            params,
            state,
            jax.tree.map(lambda new, old: jnp.where(active & lower, new, old), params, now.best),
            jnp.where(active & lower, number + 1, now.taken),
            now.losses.at[number].set(jnp.where(active, value, jnp.nan)),
        )

    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
    every = jax.vmap(epoch, (0, None, 0, 0))
    _, end = jax.lax.while_loop(
        lambda carry: jax.vmap(going, (0, None))(carry[1], carry[0]).any(),
        lambda carry: (carry[0] + 1, every(carry[1], carry[0], sites, keys[:, 1])),
        (jnp.int32(0), jax.vmap(begin)(keys[:, 0])),
    )
    said = jax.vmap(logits)(end.best, test.features[sites]).argmax(-1).astype(jnp.int32)
    return Fitted(said, end.taken, end.losses)


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
