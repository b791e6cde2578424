"""Tests of whether domain neurons exceed chance: with other examples, and with shuffled domains.

Selection by entropy with a top rate of one percent selects one percent of any data, so a selection
alone proves nothing. These functions split, resample and shuffle the examples of the domains:

    split_half(counts, tokens, domain, sizes=(50, 100, 200))   # do two halves agree?
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

from mllm_jax.analysis import checks, domain_neurons, intervals, jaccard

POWER = 0.5  # a test that would miss the most specific neuron more often than this is refused
Select = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (counts, tokens) by domain -> mask


def neurons(counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Select the neurons as the paper does.

    Args:
      counts: int[D_, L, F], of each domain.
      tokens: int[D_], of each domain.

    Returns:
      bool[D_, L, F].
    """
    return domain_neurons.select(counts, tokens).mask


def pool(
    counts: np.ndarray, tokens: np.ndarray, domain: np.ndarray, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum counts and tokens by domain.

    Args:
      counts: int[N, L, F], of each example.
      tokens: int[N], of each example.
      domain: int[N], of each example.
      weight: int[N], how often each example counts; once by default.

    Returns:
      The counts int64[D_, L, F] and the tokens int64[D_] of each domain.
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
    """The agreement of selections from two halves of the examples.

    Attributes:
      sizes: int64[S], number of examples of a domain in a half.
      jaccard: float64[S, R, D_], Jaccard index of the two halves in each repeat; 0 where both
        are empty.
      neurons: float64[S, D_], mean number of neurons selected by a half.
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
    """Measure the agreement of selections from two disjoint halves, by the size of the halves.

    Args:
      counts: int[N, L, F], of each example.
      tokens: int[N], of each example.
      domain: int[N], of each example.
      sizes: Numbers of examples of each domain in a half; by default half of the smallest domain.
      repeats: Number of random splits of each size.
      seed: Seed of the splits.
      select: The selection; that of the paper by default.

    Returns:
      The agreement.
    """
    counts, tokens, domain = _checked(counts, tokens, domain)
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: one split or more is needed")
    members = [np.flatnonzero(domain == d) for d in range(domain.max() + 1)]
    most = min(map(len, members)) // 2
    halves_of = np.array(sizes or (most,))
    if most < 1 or (halves_of < 1).any() or (halves_of > most).any():
        raise ValueError(
            f"a half can have 1 to {most} examples of a domain, not {halves_of.tolist()}"
        )
    rng = np.random.default_rng(seed)
    agreement = np.empty((len(halves_of), repeats, len(members)))
    count = np.zeros((len(halves_of), len(members)))
    for s, size in enumerate(halves_of):
        for repeat in range(repeats):
            drawn = np.stack([rng.permutation(m)[: 2 * size] for m in members])
            halves = []
            for half in (drawn[:, :size], drawn[:, size:]):
                at = half.ravel()
                halves.append(select(*pool(counts[at], tokens[at], domain[at])))
                count[s] += halves[-1].sum(axis=(1, 2)) / (2 * repeats)
            agreement[s, repeat] = jaccard.of_masks(*halves)
    return Agreement(halves_of, agreement, count)


class Bootstrap(NamedTuple):
    """Selections of resampled examples.

    Attributes:
      mask: bool[D_, L, F], the selection of all examples.
      frequency: float64[D_, L, F], share of the resamples that select a neuron.
      jaccard: The mean Jaccard index of a resample with `mask` and its interval over resamples,
        float64[D_].
      per_layer: int64[R, D_, L], number of neurons of each resample.
    """

    mask: np.ndarray
    frequency: np.ndarray
    jaccard: intervals.Interval[np.ndarray]
    per_layer: np.ndarray


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
    """Measure how often each neuron is selected when the examples of every domain are resampled.

    Args:
      counts: int[N, L, F], of each example.
      tokens: int[N], of each example.
      domain: int[N], of each example.
      resamples: Number of resamples.
      level: Mass of the interval.
      seed: Seed of the resamples.
      select: The selection; that of the paper by default.
    """
    counts, tokens, domain = _checked(counts, tokens, domain)
    mask = select(*pool(counts, tokens, domain))
    rng = np.random.default_rng(seed)
    times = np.zeros(mask.shape, np.int64)
    similarities: list[np.ndarray] = []
    per_layer: list[np.ndarray] = []
    for _ in range(resamples):
        weight = np.zeros(len(domain), np.int64)
        for d in range(len(mask)):
            members = np.flatnonzero(domain == d)
            weight[members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)))
        resampled = select(*pool(counts, tokens, domain, weight))
        times += resampled
        similarities.append(jaccard.of_masks(mask, resampled))
        per_layer.append(resampled.sum(axis=-1))
    low, high = intervals.percentiles(np.array(similarities), level=level)
    mean = intervals.Interval(np.mean(similarities, axis=0), low, high)
    return Bootstrap(mask, times / resamples, mean, np.array(per_layer))


@dataclasses.dataclass(frozen=True, eq=False)
class ShuffleTest:
    """The selected neurons whose entropy is below that of shuffled domains.

    Attributes:
      selection: The selection of the true domains.
      p_values: float64[L, F], of the hypothesis that the domain of an example does not matter to
        the neuron; adjusted for all neurons of the module. 1 if it is not a candidate.
      mask: bool[D_, L, F], `selection.mask` where p <= level: the significant domain neurons.
      level: Probability that `mask` has any neuron when domains do not matter.
      lowest: float64[R], the lowest entropy in each shuffle, nats.
    """

    selection: domain_neurons.SelectedNeurons
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
    """Test the entropies against the lowest entropies of shuffled domain labels.

    Whole examples change their domain, so that tokens of one example stay together. Each shuffle
    gives the lowest entropy of all its candidates, and a neuron's p-value is the share of shuffles
    that reach its entropy: the probability of any false neuron in the module is at most `level`
    (the minimum method of Westfall and Young, 1993). The test is exact for any counts.

    Args:
      counts: int[N, L, F], of each example.
      tokens: int[N], of each example.
      domain: int[N], of each example.
      shuffles: Number of shuffles, R; the smallest p-value is 1 / (R + 1).
      level: Level of the test.
      seed: Seed of the shuffles.
      **options: Options of `domain_neurons.select`.

    Returns:
      The test.

    Raises:
      ValueError: No neuron could be significant, see `power`.
    """
    if not 1 / (shuffles + 1) <= level < 1:
        raise ValueError(
            f"level={level} cannot be reached by {shuffles} shuffles; use more of them"
        )
    counts, tokens, domain = _checked(counts, tokens, domain)
    if power(domain, shuffles, level) < POWER:
        raise ValueError(
            f"level={level} cannot be reached by {len(domain)} examples: one shuffle of "
            f"{1 / _chance_of_true_division(domain):.0f} gives the true labels; count "
            "more examples, or smaller groups of them"
        )

    def select(labels: np.ndarray) -> domain_neurons.SelectedNeurons:
        return domain_neurons.select(*pool(counts, tokens, labels), **options)

    rng = np.random.default_rng(seed)
    selection = select(domain)
    lowest = np.array([select(rng.permutation(domain)).entropy.min() for _ in range(shuffles)])
    as_low = np.searchsorted(np.sort(lowest), selection.entropy, side="right")
    p_values = np.where(np.isinf(selection.entropy), 1.0, (1 + as_low) / (1 + shuffles))
    return ShuffleTest(selection, p_values, selection.mask & (p_values <= level), level, lowest)


def power(domain: np.ndarray, shuffles: int, level: float) -> float:
    """Return the probability that `shuffle_test` finds the most specific neuron possible.

    Shuffles that repeat the true division of the examples have its entropy as well.

    Args:
      domain: int[N], of each example.
      shuffles: Number of shuffles of the test.
      level: Level of the test.
    """
    allowed = math.floor(level * (shuffles + 1) + 1e-9) - 1
    return float(scipy.stats.binom.cdf(allowed, shuffles, _chance_of_true_division(domain)))


def _chance_of_true_division(domain: np.ndarray) -> float:
    """Return the share of labellings that divide the examples as `domain` does, in any order."""
    sizes = np.bincount(domain).tolist()
    names = math.prod(map(math.factorial, collections.Counter(sizes).values()))
    return names * math.prod(map(math.factorial, sizes)) / math.factorial(sum(sizes))


def _checked(
    counts: np.ndarray, tokens: np.ndarray, domain: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
