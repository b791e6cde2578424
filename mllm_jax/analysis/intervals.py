"""Intervals over examples and over draws, a paired test, and Holm's correction for many tests.

Everything is seeded and free of BLAS, so that equal inputs give equal bytes.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import scipy.stats

from mllm_jax.analysis import checks

RESAMPLES = 2000
LEVEL = 0.95
Value = TypeVar("Value", float, np.ndarray)


class Interval(NamedTuple, Generic[Value]):
    """A value and its percentile interval; floats, or float64 arrays of one shape.

    Attributes:
      value: The estimate.
      low: The lower end.
      high: The upper end.
    """

    value: Value
    low: Value
    high: Value

    @property
    def excludes_zero(self) -> Any:
        """Whether zero lies outside: a bool, or bools in the shape of the value."""
        return (self.low > 0) | (self.high < 0)


def draws(
    examples: int, *, resamples: int = RESAMPLES, seed: int | tuple[int, ...] = 0
) -> np.ndarray:
    """Draw bootstrap resamples: int64[resamples, examples], how often each holds each example."""
    if examples < 1:
        raise ValueError("a bootstrap needs at least one example, got none")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: a bootstrap needs at least one")
    equal = np.full(examples, 1 / examples)
    return np.random.default_rng(seed).multinomial(examples, equal, size=resamples)


def percentiles(
    samples: np.ndarray, *, level: float = LEVEL, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the central interval (low, high) of samples along their first axis.

    Args:
      samples: float[samples, ...].
      level: Mass of the interval.
      **options: Options of `np.quantile`.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} lies outside (0, 1); 0.95 is a 95 % interval")
    if not len(checks.numbers(samples, "samples")):
        raise ValueError("samples is empty: there is no interval of nothing")
    checks.finite(samples, "samples")
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0, **options)
    return low, high


def ratio(
    sums: np.ndarray,
    weights: np.ndarray,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval[np.ndarray]:
    """Compute the ratio of two totals, such as entropy per token, with an interval over examples.

    Args:
      sums: float[N, ...], each example's sum.
      weights: float[N, ...], each example's weight (its number of tokens), or 1 on an axis.
      level: Mass of the interval.
      resamples: Number of bootstrap resamples.
      seed: Seed of the resamples. Equal seeds resample alike, which pairs two calls.

    Returns:
      The interval of sum(sums) / sum(weights), shape of sums without its first axis.
    """
    sums, weights = _by_example(sums, "sums"), _by_example(weights, "weights")
    if len(sums) != len(weights):
        raise ValueError(f"{len(sums)} sums for {len(weights)} weights")
    lead = weights.shape[: sums.ndim]
    if weights.ndim > sums.ndim or any(
        w not in (1, s) for w, s in zip(lead, sums.shape, strict=False)
    ):
        raise ValueError(f"weights {weights.shape} do not fit sums {sums.shape}")
    checks.at_least(weights, 0, "weights")
    drawn = draws(len(sums), resamples=resamples, seed=seed)
    if not (weights.sum(axis=0) > 0).all():
        raise ValueError("weights sum to zero: no example has a token of this kind")

    totals = np.einsum("rn,n...->r...", drawn, weights)
    with np.errstate(invalid="ignore"):  # a resample may miss every example that has tokens
        samples = np.einsum("rn,n...->r...", drawn, sums) / totals
    value = sums.sum(axis=0) / weights.sum(axis=0)
    return Interval(value, *percentiles(np.where(totals > 0, samples, value), level=level))


def mean(values: np.ndarray, **options: Any) -> Interval[np.ndarray]:
    """Compute the mean over examples, such as accuracy.

    Args:
      values: float[N, ...], a value (or an array of values) for each example.
      **options: Level, resamples and seed, as in `ratio`.

    Returns:
      The interval of the mean, shape of values without its first axis.
    """
    values = _by_example(values, "values")
    return ratio(values, np.ones((len(values),) + (1,) * (values.ndim - 1)), **options)


def paired_difference(
    before: np.ndarray, after: np.ndarray, **options: Any
) -> Interval[np.ndarray]:
    """Compute the mean of after - before over the same examples, such as a change of accuracy.

    Args:
      before: float[N, ...], a value for each example.
      after: float[N, ...], of the same examples in the same order.
      **options: Level, resamples and seed, as in `ratio`.

    Returns:
      The interval of the difference.
    """
    before, after = _by_example(before, "before"), _by_example(after, "after")
    if before.shape != after.shape:
        raise ValueError(
            f"before and after must pair up, got shapes {before.shape} and {after.shape}"
        )
    return mean(after - before, **options)


class Effect(NamedTuple):
    """The effect of something beyond that of its random controls, such as drawn neurons.

    Attributes:
      value: The mean over examples of own - control, the mean over draws.
      low: The lower end of its interval; NaN with a single draw or example, which have no spread.
      high: The upper end.
      p: The two-sided p-value of no difference; NaN likewise.
      error: The standard error of the value; NaN likewise.
      degrees: The degrees of freedom of the interval (Satterthwaite); NaN likewise.
    """

    value: float
    low: float
    high: float
    p: float
    error: float
    degrees: float


def effect(own: np.ndarray, control: np.ndarray, *, level: float = LEVEL) -> Effect:
    """Compute own - control with a t interval over both examples and draws.

    Examples and draws are both samples: with few draws, one that happens to matter makes the
    interval wide. The variance is the sum of that over examples (of the mean over draws) and that
    over draws (of the mean over examples); the part that depends on both is counted twice, so that
    the variance is rather too large. The p-value is the larger of those of the t test and of
    `sign_flip`: the latter is exact when few examples change, but takes the draws as given.

    Args:
      own: float[N], a value for each example.
      control: float[R, N], the values of the same examples in R draws.
      level: Mass of the interval.

    Returns:
      The effect.
    """
    own = checks.finite(own, "own", axes="[N]")
    control = checks.finite(control, "control", axes="[R, N]")
    _check_controls(own, control, level)
    value, error, degrees = (float(part) for part in _own_less_control(own, control))
    if np.isnan(error):
        return Effect(value, *[np.nan] * 5)
    differences = own - control.mean(axis=0)
    if not error:
        return Effect(value, value, value, sign_flip(differences), 0.0, degrees)
    half = float(scipy.stats.t.ppf((1 + level) / 2, degrees)) * error
    p = 2 * float(scipy.stats.t.sf(abs(value) / error, degrees))
    return Effect(value, value - half, value + half, max(p, sign_flip(differences)), error, degrees)


def difference(
    own: np.ndarray, control: np.ndarray, *, level: float = LEVEL
) -> Interval[np.ndarray]:
    """Compute own - control of several measures, each with the interval of `effect`.

    Args:
      own: float[..., N], a value for each example.
      control: float[R, ..., N], the values of the same examples in R draws.
      level: Mass of the interval.

    Returns:
      The differences, float64[...]; the ends are NaN with a single example or draw.
    """
    own, control = checks.finite(own, "own"), checks.finite(control, "control")
    _check_controls(own, control, level)
    value, error, degrees = _own_less_control(own, control)
    half = np.where(error > 0, scipy.stats.t.ppf((1 + level) / 2, degrees) * error, error)
    return Interval(value, value - half, value + half)


def _check_controls(own: np.ndarray, control: np.ndarray, level: float) -> None:
    if not control.size or control.shape[1:] != own.shape:
        axes = ", ".join(map(str, own.shape))
        raise ValueError(f"control must be [draws, {axes}], one or more, not {control.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level={level} lies outside (0, 1); 0.95 is a 95 % interval")


def _own_less_control(
    own: np.ndarray, control: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the difference, its standard error and the degrees of freedom, see `effect`.

    The last two are NaN with a single example or draw. Without any spread the error is 0.
    """
    differences = own - control.mean(axis=0)
    value = differences.mean(axis=-1)
    sizes = np.array([control.shape[-1], len(control)])
    if sizes.min() < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    by_draw = control.mean(axis=-1).var(axis=0, ddof=1)
    parts = np.stack([differences.var(axis=-1, ddof=1), by_draw], axis=-1) / sizes
    total = parts.sum(axis=-1)
    shares = (parts**2 / (sizes - 1)).sum(axis=-1)
    degrees = np.divide(total**2, shares, out=np.full_like(total, sizes.min() - 1), where=total > 0)
    return value, np.sqrt(total), degrees


def equivalence(found: Effect, margin: float, *, answers: int | None = None) -> float:
    """Test whether an effect is smaller than a margin, by two one-sided t tests (TOST).

    A difference that is not significant may still be large; one that passes this test is not.

    Args:
      found: The effect, of `effect`.
      margin: The largest effect, to either side, that counts as none, in (0, 1).
      answers: The number of examples, if each is right or wrong. If hardly any of them changes, the
        t test has no spread to judge by; the p-value is at least `chance_of_fewer`.

    Returns:
      The p-value of an effect of the margin or more, the larger of both sides; NaN where the
      effect has no standard error.
    """
    if not 0 < margin < 1:
        raise ValueError(
            f"margin={margin}, the largest effect that counts as none, must be in (0, 1)"
        )
    distance = margin - abs(found.value)
    least = 0.0 if answers is None else chance_of_fewer(found.value, margin, answers)
    if not found.error:
        return max(float(distance <= 0), least)
    return max(float(scipy.stats.t.sf(distance / found.error, found.degrees)), least)


def chance_of_fewer(change: float, margin: float, answers: int) -> float:
    """Return how likely so small a change is where a share `margin` of the answers changes.

    All of them change to one side, which varies least. Shares between two numbers of answers, such
    as means over draws, have a probability in between.

    Args:
      change: The mean change of right and wrong answers, a share of them.
      margin: The share of answers that change, in (0, 1).
      answers: The number of answers.

    Returns:
      The probability, of a binomial distribution: (1 - margin)^answers if none changed.
    """
    changed = abs(change) * answers
    if changed >= answers:
        return 1.0
    return float(scipy.stats.beta.sf(margin, changed + 1, answers - changed))


def sign_flip(differences: np.ndarray, *, resamples: int = 9999, seed: int = 0) -> float:
    """Test whether paired differences have mean zero, by flipping their signs.

    Differences of one size, such as those of answers that are right or wrong, are tested exactly
    (McNemar's test); others by random flips.

    Args:
      differences: float[N], after - before of each example.
      resamples: Number of random flips, of which the smallest p-value is 1 / (resamples + 1).
      seed: Seed of the flips.

    Returns:
      The two-sided p-value, in (0, 1].
    """
    differences = checks.finite(differences, "differences", axes="[N]")
    if not differences.size:
        raise ValueError("differences is empty: there is nothing to test")
    changed = differences[differences != 0]
    if not changed.size:
        return 1.0
    if (np.abs(changed) == np.abs(changed[0])).all():
        return float(scipy.stats.binomtest(int((changed > 0).sum()), changed.size).pvalue)
    drawn = np.random.default_rng(seed).integers(
        256, size=(resamples, -(-changed.size // 8)), dtype=np.uint8
    )
    signs = 2.0 * np.unpackbits(drawn, axis=1, count=changed.size) - 1
    flipped = np.abs(np.einsum("rn,n->r", signs, changed))
    # Sums that differ by rounding alone count as equal.
    as_large = flipped >= np.abs(changed.sum()) * (1 - 1e-12)
    return float((1 + as_large.sum()) / (1 + resamples))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust p-values for their number; reject those below the level (Holm 1979).

    Args:
      p_values: float[...], of one family of tests.

    Returns:
      float64[...], same shape.
    """
    p_values = _by_example(p_values, "p_values")
    if ((p_values < 0) | (p_values > 1)).any():
        raise ValueError("p_values must lie in [0, 1]")
    order = np.argsort(p_values, axis=None, kind="stable")
    steps = p_values.flat[order] * np.arange(p_values.size, 0, -1)
    adjusted = np.empty(p_values.shape)
    adjusted.flat[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _by_example(values: np.ndarray, name: str) -> np.ndarray:
    values = checks.finite(values, name)
    if values.ndim == 0:
        raise ValueError(f"{name} must have an axis of examples, got a single number")
    return values
