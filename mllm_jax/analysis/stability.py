"""Are domain neurons more than chance? Stability against the sample, and shuffled domains.

Entropy with a top rate selects its one percent whatever the data are, so a selection alone proves
nothing. Here the examples of the domains are split, resampled and shuffled:

    split_half(counts, tokens, domain, sizes=(50, 100, 200))   # do two halves find the same?
    bootstrap(counts, tokens, domain)                          # how often is each neuron selected?
    shuffle_test(counts, tokens, domain)                       # which are beyond shuffled domains?

All take counts by example (or by group of examples): int[N, L, F], int[N] tokens and int[N]
domains, 0 to D_ - 1. To compare settings, such as tokens of different kinds, thresholds by layer or
by module, or single and multiple assignment, give their masks to `selectors.overlap`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from mllm_jax.analysis import checks, domain_neurons, intervals

POWER = 0.5  # a test that would miss the most specific neuron more often than this is refused
Select = Callable[[np.ndarray, np.ndarray], np.ndarray]  # counts, tokens of domains to a mask


def neurons(counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The selection of the paper: bool[D_, L, F] of int[D_, L, F] and int[D_]."""
    return domain_neurons.select(counts, tokens).mask


def pool(
    counts: np.ndarray, tokens: np.ndarray, domain: np.ndarray, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Counts and tokens of domains: int64[D_, L, F], int64[D_].

    Args:
        counts: int[N, L, F], of each example.
        tokens: int[N].
        domain: int[N].
        weight: int[N], how often each example counts; once by default.
    """
    counts, tokens, domain = (
        checks.integers(array, name)
        for array, name in ((counts, "counts"), (tokens, "tokens"), (domain, "domain"))
    )
    weight = np.ones(len(domain), np.int64) if weight is None else checks.integers(weight, "weight")
    total = np.zeros((int(domain.max()) + 1, *counts.shape[1:]), np.int64)
    for example in np.flatnonzero(weight):
        total[domain[example]] += weight[example] * counts[example].astype(np.int64)
    return total, np.bincount(domain, weight * tokens, len(total)).astype(np.int64)


class Agreement(NamedTuple):
    """What two halves share.

    Attributes:
        sizes: int64[S], examples of a domain in a half.
        jaccard: float64[S, R, D_], shared over all neurons of the two halves in each repeat; 0
            where both have none.
        neurons: float64[S, D_], mean number of neurons of a half.
    """

    sizes: np.ndarray
    jaccard: np.ndarray
    neurons: np.ndarray


def split_half(
    counts: np.ndarray,
    tokens: np.ndarray,
    domain: np.ndarray,
    *,
    sizes: Sequence[int] = (),
    repeats: int = 20,
    seed: int = 0,
    select: Select = neurons,
) -> Agreement:
    """Agreement of selections from two disjoint halves, against their size.

    Args:
        counts, tokens, domain: by example, see `pool`.
        sizes: examples of each domain in a half; by default half of the smallest domain alone.
        repeats: random splits of each size.
        seed: of the splits.
        select: any selection; that of the paper by default.

    Returns:
        The agreement.
    """
    counts, tokens, domain = _checked(counts, tokens, domain)
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: one split or more is needed")
    members = [np.flatnonzero(domain == d) for d in range(domain.max() + 1)]
    most = min(map(len, members)) // 2
    sizes = np.array(sizes or (most,))
    if most < 1 or (sizes < 1).any() or (sizes > most).any():
        raise ValueError(f"a half can have 1 to {most} examples of a domain, not {sizes.tolist()}")
    rng = np.random.default_rng(seed)
    found = np.empty((len(sizes), repeats, len(members)))
    count = np.zeros((len(sizes), len(members)))
    for s, size in enumerate(sizes):
        for repeat in range(repeats):
            drawn = np.stack([rng.permutation(m)[: 2 * size] for m in members])
            halves = []
            for half in (drawn[:, :size], drawn[:, size:]):
                at = half.ravel()
                halves.append(select(*pool(counts[at], tokens[at], domain[at])))
                count[s] += halves[-1].sum(axis=(1, 2)) / (2 * repeats)
            found[s, repeat] = jaccard(*halves)
    return Agreement(sizes, found, count)


class Bootstrap(NamedTuple):
    """Selections of resampled examples.

    Attributes:
        mask: bool[D_, L, F], the selection of all examples.
        frequency: float64[D_, L, F], share of the resamples that select a neuron.
        jaccard: of each resample with `mask`; the interval of float64[D_] over resamples, its value
            the mean.
    """

    mask: np.ndarray
    frequency: np.ndarray
    jaccard: intervals.Interval


def bootstrap(
    counts: np.ndarray,
    tokens: np.ndarray,
    domain: np.ndarray,
    *,
    resamples: int = 200,
    level: float = intervals.LEVEL,
    seed: int = 0,
    select: Select = neurons,
) -> Bootstrap:
    """How stable each neuron is when the examples of every domain are drawn again.

    Args:
        counts, tokens, domain: by example, see `pool`.
        resamples: how many.
        level: mass of the interval.
        seed: of the resamples.
        select: any selection; that of the paper by default.
    """
    counts, tokens, domain = _checked(counts, tokens, domain)
    mask = select(*pool(counts, tokens, domain))
    rng = np.random.default_rng(seed)
    times, found = np.zeros(mask.shape, np.int64), []
    for _ in range(resamples):
        weight = np.zeros(len(domain), np.int64)
        for d in range(len(mask)):
            members = np.flatnonzero(domain == d)
            weight[members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)))
        again = select(*pool(counts, tokens, domain, weight))
        times += again
        found.append(jaccard(mask, again))
    low, high = intervals.percentiles(np.array(found), level=level)
    mean = intervals.Interval(np.mean(found, axis=0), low, high)
    return Bootstrap(mask, times / resamples, mean)


@dataclasses.dataclass(frozen=True, eq=False)
class ShuffleTest:
    """Which selected neurons are beyond what shuffled domains give.

    Attributes:
        found: the selection of the true domains.
        p_values: float64[L, F], that a neuron's entropy comes from examples whose domain does not
            matter; adjusted for all neurons of the module. 1 for what is no candidate.
        mask: bool[D_, L, F], `found.mask` where p <= level: the domain neurons to speak of.
        level: chance that `mask` has any neuron when domains do not matter.
        lowest: float64[R], the lowest entropy in each shuffle, nats.
    """

    found: domain_neurons.SelectedNeurons
    p_values: np.ndarray
    mask: np.ndarray
    level: float
    lowest: np.ndarray


def shuffle_test(
    counts: np.ndarray,
    tokens: np.ndarray,
    domain: np.ndarray,
    *,
    shuffles: int = 199,
    level: float = 0.05,
    seed: int = 0,
    **options,
) -> ShuffleTest:
    """Tests the lowest entropies against those of shuffled domain labels.

    Whole examples change their domain, so that tokens of one example stay together. Each shuffle
    gives the lowest entropy of all its candidates, and a neuron's p-value is the share of shuffles
    that go as low: one false neuron in the whole module is as rare as `level` says (the minimum
    method of Westfall and Young, 1993). It is exact, whatever the counts are like.

    Args:
        counts, tokens, domain: by example, see `pool`.
        shuffles: R; the smallest p-value is 1 / (R + 1).
        level: of the test.
        seed: of the shuffles.
        **options: of `domain_neurons.select`.

    Returns:
        The test.

    Raises:
        ValueError: no neuron could be beyond the level, see `power`.
    """
    if not 1 / (shuffles + 1) <= level < 1:
        raise ValueError(
            f"level={level} cannot be reached by {shuffles} shuffles; use more of them"
        )
    counts, tokens, domain = _checked(counts, tokens, domain)
    if power(domain, shuffles, level) < POWER:
        raise ValueError(
            f"level={level} cannot be reached by {len(domain)} examples: one shuffle of "
            f"{1 / _true_again(domain):.0f} gives the true division again; count more examples, or "
            "smaller groups of them"
        )

    def select(labels):
        return domain_neurons.select(*pool(counts, tokens, labels), **options)

    rng = np.random.default_rng(seed)
    found = select(domain)
    lowest = np.array([select(rng.permutation(domain)).entropy.min() for _ in range(shuffles)])
    as_low = np.searchsorted(np.sort(lowest), found.entropy, side="right")
    p_values = np.where(np.isinf(found.entropy), 1.0, (1 + as_low) / (1 + shuffles))
    return ShuffleTest(found, p_values, found.mask & (p_values <= level), level, lowest)


def power(domain: np.ndarray, shuffles: int, level: float) -> float:
    """The chance that `shuffle_test` finds even the most specific neuron that there can be.

    Shuffles that give the true division again are as low as the truth.

    Args:
        domain: int[N], of each example.
        shuffles, level: of the test.
    """
    allowed = math.floor(level * (shuffles + 1) + 1e-9) - 1
    return float(scipy.stats.binom.cdf(allowed, shuffles, _true_again(domain)))


def _true_again(domain: np.ndarray) -> float:
    """Share of all labellings that divide the examples as they are; domains may change names."""
    sizes = np.bincount(domain).tolist()
    names = math.prod(map(math.factorial, collections.Counter(sizes).values()))
    return names * math.prod(map(math.factorial, sizes)) / math.factorial(sum(sizes))


def jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[D_]: shared over all neurons of two bool[D_, L, F]; 0 where both have none."""
    a, b = checks.mask(a, "a"), checks.mask(b, "b")
    return (a & b).sum(axis=(1, 2)) / np.maximum((a | b).sum(axis=(1, 2)), 1)


def _checked(counts, tokens, domain) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts, tokens, domain = (
        checks.integers(array, name)
        for array, name in ((counts, "counts"), (tokens, "tokens"), (domain, "domain"))
    )
    if counts.ndim != 3 or not len(counts) == tokens.size == domain.size:
        raise ValueError(
            "counts must be [N, L, F] with N tokens and N domains, got shapes "
            f"{counts.shape}, {tokens.shape} and {domain.shape}"
        )
    checks.at_least(counts, 0, "counts")
    if (above := counts > tokens[:, None, None]).any():
        place = np.argwhere(above)[0].tolist()
        raise ValueError(
            f"counts{place} is {counts[tuple(place)]}, but example {place[0]} has "
            f"{tokens[place[0]]} tokens: a neuron is active on a token once at most"
        )
    if not domain.size or domain.min() < 0 or (np.bincount(domain) == 0).any():
        raise ValueError("every domain from 0 up needs an example or more")
    return counts, tokens, domain
