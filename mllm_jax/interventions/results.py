"""Results of captures, and how the results of several batches are merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mllm_jax import notebook_results
from mllm_jax.typing import AnyArray, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of every unit. The layer axis leads; with `by`, the last axis is kinds.

    Attributes:
      positive: The number of values above zero, int32[L, F, kinds].
      sum: The sum of the values, float32[L, F, kinds].
      squares: The sum of their squares, float32[L, F, kinds].
      max: Their maximum, float32[L, F, kinds]; -inf if there was no token.
      tokens: The number of tokens, int32[L, kinds].
      centred: The sum of squared deviations from the mean, float32[L, F, kinds], which cannot be
        recovered from `squares` where the mean is large.
      kinds: The names along the last axis; empty without `by`. Static.
    """

    positive: Int[AnyArray, "L F kinds"]
    sum: Float[AnyArray, "L F kinds"]
    squares: Float[AnyArray, "L F kinds"]
    max: Float[AnyArray, "L F kinds"]
    tokens: Int[AnyArray, "L kinds"]
    centred: Float[AnyArray, "L F kinds"]
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def mean(self) -> Float[np.ndarray, "L F kinds"]:
        """The mean, float64; NaN if there was no token."""
        return self._per_token(self.sum)

    @property
    def variance(self) -> Float[np.ndarray, "L F kinds"]:
        """The population variance, float64; NaN if there was no token."""
        return self._per_token(self.centred)

    @property
    def std(self) -> Float[np.ndarray, "L F kinds"]:
        """The standard deviation, float64."""
        return np.sqrt(self.variance)

    def merge(self, other: Stats) -> Stats:
        """Return the statistics of both sets of tokens. Integers are exact, in any order."""
        between = _between_groups((self._count(), other._count()), (self.sum, other.sum))
        centred = self.centred + other.centred + between.astype(self.centred.dtype)
        return Stats(
            positive=self.positive + other.positive,
            sum=self.sum + other.sum,
            squares=self.squares + other.squares,
            max=np.maximum(self.max, other.max),
            tokens=self.tokens + other.tokens,
            centred=centred,
            kinds=self.kinds,
        )

    def wide(self) -> Stats:
        """Return the same in int64 and float64 on the host, to be summed over a data set."""
        return Stats(
            positive=np.asarray(self.positive, np.int64),
            sum=np.asarray(self.sum, np.float64),
            squares=np.asarray(self.squares, np.float64),
            max=np.asarray(self.max, np.float32),
            tokens=np.asarray(self.tokens, np.int64),
            centred=np.asarray(self.centred, np.float64),
            kinds=self.kinds,
        )

    def _count(self) -> np.ndarray:
        """Return `tokens` in float64, with axes of length 1 for the axes of units."""
        count, kinds = np.asarray(self.tokens, np.float64), bool(self.kinds)
        lead = count.ndim - kinds
        ones = (1,) * (np.ndim(self.sum) - count.ndim)
        return count.reshape(*count.shape[:lead], *ones, *count.shape[lead:])

    def _per_token(self, total) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(total, np.float64) / self._count()

    def _repr_html_(self) -> str:
        return notebook_results.stats(self)


def _between_groups(counts: Sequence[np.ndarray], sums: Sequence[AnyArray]) -> np.ndarray:
    """Return what two groups' means add to their squared deviations (Chan et al. 1979), float64."""
    n, m = counts
    means = (
        np.asarray(s, np.float64) / np.maximum(c, 1) for s, c in zip(sums, counts, strict=True)
    )
    a, b = means
    return np.where((n > 0) & (m > 0), (a - b) ** 2, 0) * (n * m / np.maximum(n + m, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
    """The largest units of each token.

    Attributes:
      indices: The units, largest first, int32[L, B, T, k]; -1 where not selected.
      values: Their values, float32[L, B, T, k]; 0 where not selected.
      active: The number of units above zero, int32[L, B, T]; above k, some are left out.
    """

    indices: Int[AnyArray, "L B T k"]
    values: Float[AnyArray, "L B T k"]
    active: Int[AnyArray, "L B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lens:
    """The distribution over words that the head reads from each token's residual.

    Attributes:
      ids: The most probable words, best first, int32[L, B, T, k]; -1 where not selected. For the
        projector [L, I, P, k], tile by tile.
      log_probs: Their log-probabilities, float32[L, B, T, k]; 0 where not selected.
      entropy: The entropy in nats, float32[L, B, T]; 0 where not selected.
    """

    ids: Int[AnyArray, "L B T k"]
    log_probs: Float[AnyArray, "L B T k"]
    entropy: Float[AnyArray, "L B T"]

    def _html_(self, word: notebook_results.Word = str) -> str:
        return notebook_results.lens(self, word)

    def _repr_html_(self) -> str:
        return self._html_()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distribution:
    """The lens's distributions over words, summed over tokens; with `by`, for each kind.

    Attributes:
      sum: The sum of the distributions, float32[L, kinds, V].
      tokens: The number of tokens, int32[L, kinds].
      kinds: The names along the axis of kinds; empty without `by`, and then the axis is absent.
        Static.
    """

    sum: Float[AnyArray, "L kinds V"]
    tokens: Int[AnyArray, "L kinds"]
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def mean(self) -> Float[np.ndarray, "L kinds V"]:
        """The mean distribution, float64; NaN if there was no token."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.sum, np.float64) / np.asarray(self.tokens)[..., None]

    def top(self, k: int) -> tuple[Int[np.ndarray, "L kinds k"], Float[np.ndarray, "L kinds k"]]:
        """Return the k words with the highest mean probability, best first, with probabilities."""
        mean = self.mean
        ids = np.argsort(-mean, axis=-1, kind="stable")[..., :k]
        return ids, np.take_along_axis(mean, ids, -1)

    def merge(self, other: Distribution) -> Distribution:
        """Return the sums over both sets of tokens; see `wide`."""
        return Distribution(
            sum=self.sum + other.sum, tokens=self.tokens + other.tokens, kinds=self.kinds
        )

    def wide(self) -> Distribution:
        """Return the sums in float64 and int64."""
        return Distribution(
            sum=np.asarray(self.sum, np.float64),
            tokens=np.asarray(self.tokens, np.int64),
            kinds=self.kinds,
        )

    def _html_(self, word: notebook_results.Word = str) -> str:
        return notebook_results.distribution(self, word)

    def _repr_html_(self) -> str:
        return self._html_()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entropy:
    """The entropy of the lens, summed over the tokens of each row by kind.

    At the projector the tokens are those of all pictures that the row reads.

    Attributes:
      sum: The summed entropy in nats, float32[L, B, kinds].
      top: The summed probability of the most probable word, float32[L, B, kinds].
      tokens: The number of tokens, int32[L, B, kinds].
      kinds: The names along the last axis. Static.
    """

    sum: Float[AnyArray, "L B kinds"]
    top: Float[AnyArray, "L B kinds"]
    tokens: Int[AnyArray, "L B kinds"]
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def merge(self, other: Entropy) -> Entropy:
        """Return the sums of both; see `wide`."""
        return Entropy(
            sum=self.sum + other.sum,
            top=self.top + other.top,
            tokens=self.tokens + other.tokens,
            kinds=self.kinds,
        )

    def wide(self) -> Entropy:
        """Return the sums over all rows, without their axis, in float64 and int64."""
        return Entropy(
            sum=np.asarray(self.sum, np.float64).sum(-2),
            top=np.asarray(self.top, np.float64).sum(-2),
            tokens=np.asarray(self.tokens, np.int64).sum(-2),
            kinds=self.kinds,
        )

    def _repr_html_(self) -> str:
        return notebook_results.entropy(self)
