"""Results of captures: what leaves a pass, and how those of several batches are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of every unit. With `by`, a last axis of kinds; the layer axis leads.

    Attributes:
      positive: int32[L, F, kinds], how often the value was above zero.
      sum, squares: float32[L, F, kinds], of the value and of its square.
      max: float32[L, F, kinds], -inf where there was no token.
      tokens: int32[L, kinds], how many there were.
      centred: float32[L, F, kinds], sum of the squared deviations from the mean. `squares` loses
        them where the mean is large.
      kinds: what the last axis means; empty without `by`. Static.
    """

    positive: Any
    sum: Any
    squares: Any
    max: Any
    tokens: Any
    centred: Any
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def mean(self) -> np.ndarray:
        """float64[L, F, kinds]; NaN where there was no token."""
        return self._per_token(self.sum)

    @property
    def variance(self) -> np.ndarray:
        """float64[L, F, kinds], over the tokens there were; NaN where there was none."""
        return self._per_token(self.centred)

    @property
    def std(self) -> np.ndarray:
        """Root of the variance."""
        return np.sqrt(self.variance)

    def merge(self, other: Stats) -> Stats:
        """Of both sets of tokens. Integers are exact, in any order."""
        between = _between((self._count(), other._count()), (self.sum, other.sum))
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
        """The same in int64 and float64 on the host, to be added up over a data set."""
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
        """float64, `tokens` with ones for the axes of units."""
        count, kinds = np.asarray(self.tokens, np.float64), bool(self.kinds)
        lead = count.ndim - kinds
        ones = (1,) * (np.ndim(self.sum) - count.ndim)
        return count.reshape(*count.shape[:lead], *ones, *count.shape[lead:])

    def _per_token(self, total) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(total, np.float64) / self._count()


def _between(counts: Sequence[np.ndarray], sums: Sequence[Any]) -> np.ndarray:
    """float64: what the means of two groups add to their squared deviations (Chan et al. 1979)."""
    n, m = counts
    means = (
        np.asarray(s, np.float64) / np.maximum(c, 1) for s, c in zip(sums, counts, strict=True)
    )
    one, other = means
    return np.where((n > 0) & (m > 0), (one - other) ** 2, 0) * (n * m / np.maximum(n + m, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lens:
    """What each token's residual says through the head.

    Attributes:
      ids: int32[L, B, T, k], most probable words, best first; -1 where not selected. Of the
        projector [L, I, P, k], tile by tile.
      log_probs: float32[L, B, T, k], natural logarithm; 0 where not selected.
      entropy: float32[L, B, T], nats; 0 where not selected.
    """

    ids: Any
    log_probs: Any
    entropy: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entropy:
    """Entropy of the lens, summed over the tokens of each row by kind.

    Of the projector, over those of all pictures that the row reads.

    Attributes:
      sum: float32[L, B, kinds], nats.
      top: float32[L, B, kinds], probability of the most probable word, summed.
      tokens: int32[L, B, kinds].
      kinds: what the last axis means. Static.
    """

    sum: Any
    top: Any
    tokens: Any
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def merge(self, other: Entropy) -> Entropy:
        """Of the rows of both; see `wide`."""
        pairs = zip(self._arrays(), other._arrays(), strict=True)
        return Entropy(*(a + b for a, b in pairs), self.kinds)

    def wide(self) -> Entropy:
        """All rows together, without their axis, in float64 and int64: for any number of rows."""
        return Entropy(
            sum=np.asarray(self.sum, np.float64).sum(-2),
            top=np.asarray(self.top, np.float64).sum(-2),
            tokens=np.asarray(self.tokens, np.int64).sum(-2),
            kinds=self.kinds,
        )

    def _arrays(self):
        return self.sum, self.top, self.tokens
