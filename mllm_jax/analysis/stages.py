"""Change points between three stages of layers in an entropy curve, with their uncertainty.

MMNeuron describes the logit-lens entropy of image tokens as three stages: alignment (high and
flat), processing (falling sharply), token selection (rising a little). It gives no rule for the
boundaries. This module fits three independent straight segments by least squares. They are straight
rather than constant, because the claim is about slopes and constant segments would divide one long
fall in two; they are independent rather than joined, because a curve may jump. A segment has at
least three layers, since a line fits any two.

A boundary is reported only under these conditions:
  * There are enough examples: bootstrap intervals over a few are too narrow.
  * Three segments have a lower BIC than two and than one (a flat or straight curve has no stages).
  * Over bootstrap resamples of the examples each boundary stays within a third of the layers, and
    the two intervals do not meet.
Segments also fit a smooth bend, so the verdict states the direction of each segment, and whether
this is the claimed pattern.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mllm_jax.analysis import checks, intervals

# Number of examples. The bootstrap's 95 % interval of a normal variable covers its mean in 92 % of
# samples of 16 and in 89 % of samples of 8: 2 * t.cdf(1.96 * sqrt((n - 1) / n), n - 1) - 1.
FEWEST = 16
RULE = (
    "least-squares fit of three free straight segments of at least three layers to the mean "
    f"entropy; 95 % bootstrap intervals over examples; undecided unless there are {FEWEST} "
    "examples, BIC prefers three segments to two and to one, each interval spans at most a third "
    "of the layers, and the two do not meet"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """The boundaries of the stages of one curve.

    Attributes:
      boundaries: First layers of the second and of the third stage; None if undecided.
      low: Lower end of the bootstrap interval of each boundary, in layers; None if there are too
        few layers.
      high: Upper end of the interval; None if there are too few layers.
      verdict: One line with the result, or why it is undecided.
      curve: float64[L], mean entropy, nats.
      fit: float64[L], the three segments; None if there are too few layers.
      slopes: float64[3], nats per layer; None if there are too few layers.
      claimed: Whether the boundaries are decided and the segments have the claimed pattern.
      samples: int64[resamples, 2], the boundaries of every resample.
    """

    boundaries: tuple[int, int] | None
    low: tuple[int, int] | None
    high: tuple[int, int] | None
    verdict: str
    curve: np.ndarray
    fit: np.ndarray | None
    slopes: np.ndarray | None
    samples: np.ndarray
    claimed: bool


def find(
    sums: np.ndarray,
    tokens: np.ndarray,
    *,
    min_length: int = 3,
    fewest: int = FEWEST,
    level: float = intervals.LEVEL,
    resamples: int = intervals.RESAMPLES,
    seed: int = 0,
) -> Stages:
    """Find the two stage boundaries of a mean entropy curve.

    Args:
      sums: float[N, L], sum of the entropies of an example's tokens at each layer, nats.
      tokens: int[N], number of those tokens.
      min_length: Smallest number of layers in a stage, at least 3.
      fewest: Smallest number of examples for a decision.
      level: Mass of the intervals.
      resamples: Number of bootstrap resamples.
      seed: Seed of the resamples.

    Returns:
      The stages.
    """
    sums = checks.finite(sums, "sums")
    tokens = checks.at_least(checks.finite(tokens, "tokens"), 0, "tokens")
    if sums.ndim != 2 or tokens.shape != sums.shape[:1]:
        raise ValueError(
            f"sums must be [N, L] and tokens [N], got shapes {sums.shape} and {tokens.shape}"
        )
    if min_length < 3:
        raise ValueError(
            f"min_length={min_length}: a line fits any two layers, so a stage needs three"
        )
    sums, tokens = sums[tokens > 0], tokens[tokens > 0]
    examples = len(sums)
    if examples < 2:
        raise ValueError(f"stage boundaries need at least two examples with tokens, got {examples}")
    drawn = intervals.draws(examples, resamples=resamples, seed=seed)
    resampled = np.einsum("rn,nl->rl", drawn, sums) / (drawn @ tokens)[:, None]
    return find_resampled(
        sums.sum(axis=0) / tokens.sum(), resampled, examples, min_length=min_length,
        fewest=fewest, level=level,
    )  # fmt: skip


def undecided(curve: np.ndarray, reason: str) -> Stages:
    """Return the stages of a curve whose boundaries cannot be found."""
    none = np.zeros((0, 2), np.int64)
    return Stages(None, None, None, f"undecided: {reason}", curve, None, None, none, False)


def find_resampled(
    curve: np.ndarray,
    resampled: np.ndarray,
    examples: int,
    *,
    min_length: int = 3,
    fewest: int = FEWEST,
    level: float = intervals.LEVEL,
) -> Stages:
    """Find the two stage boundaries of any curve, from curves of resampled examples.

    Args:
      curve: float[L], of all examples.
      resampled: float[R, L], of resamples of them.
      examples: Number of examples.
      min_length: Smallest number of layers in a stage, at least 3.
      fewest: Smallest number of examples for a decision.
      level: Mass of the intervals.

    Returns:
      The stages.
    """
    curve, layers = _curve(curve), len(curve)
    if layers < 3 * min_length:
        return undecided(curve, f"{layers} layers are too few for three stages of {min_length}")
    samples, _ = _split(_costs(resampled, min_length), min_length)
    low, high = map(_pair, intervals.percentiles(samples, level=level, method="inverted_cdf"))
    costs = _costs(curve[None], min_length)
    pairs, (error,) = _split(costs, min_length)
    boundaries = _pair(pairs[0])
    fit, slopes = _lines(curve, boundaries)
    doubt = _doubt(curve, costs[0], float(error), min_length, low, high)
    if examples < fewest:
        doubt = f"{examples} examples are too few, at least {fewest} are needed"
    claimed, words = _describe(slopes, boundaries, curve)
    return Stages(
        None if doubt else boundaries, low, high, f"undecided: {doubt}" if doubt else words, curve,
        fit, slopes, samples, claimed and not doubt,
    )  # fmt: skip


def turning_points(curve: np.ndarray, *, window: int = 3) -> list[int]:
    """Return the layers at which the smoothed curve turns from falling to rising or back.

    Args:
      curve: float[L], mean entropy, nats.
      window: Odd width of the moving average, in layers.

    Returns:
      The layers, in order; empty for a curve that only falls or only rises.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window} must be odd and positive")
    padded = np.pad(_curve(curve), window // 2, mode="edge")
    smooth = np.convolve(padded, np.full(window, 1 / window), mode="valid")
    slope = np.diff(smooth)
    slope[np.abs(slope) < 1e-9 * np.abs(smooth).max()] = 0  # rounding
    moving = np.flatnonzero(slope)
    turns = np.flatnonzero(np.diff(np.sign(slope[moving])))
    return [int(moving[turn + 1]) for turn in turns]


def bends(curve: np.ndarray, *, window: int | None = None) -> list[int]:
    """Return the two layers at which the slope changes most: a second, local rule.

    Args:
      curve: float[L], mean entropy, nats.
      window: Number of layers on either side of a bend whose slopes are compared, and smallest
        distance of the bends; by default a sixth of the layers, at least three.

    Returns:
      The first layers after the bends, in order; empty if there are too few layers.
    """
    curve = _curve(curve)
    window = max(3, len(curve) // 6) if window is None else window
    if window < 2:
        raise ValueError(f"window={window}: a slope needs two layers")
    if len(curve) < 3 * window:
        return []
    x = np.arange(window) - (window - 1) / 2
    slope = np.lib.stride_tricks.sliding_window_view(curve, window) @ x / (x @ x)
    change = np.abs(slope[window:] - slope[:-window])  # at layer window, window + 1, ...
    first = int(change.argmax())
    apart = np.abs(np.arange(len(change)) - first) >= window
    second = int(np.where(apart, change, -1).argmax())
    return sorted((first + window, second + window))


def confirmed(stages: Stages, points: Sequence[int], *, slack: int = 1) -> list[bool] | None:
    """Return whether the interval of each boundary contains a bend, found by the second rule.

    Args:
      stages: The stages, from `find`.
      points: The bends, from `bends`.
      slack: Number of layers by which a bend may lie outside the interval.

    Returns:
      One answer for each boundary; None if the boundaries are undecided.
    """
    if stages.boundaries is None:
        return None
    return [
        any(low - slack <= point <= high + slack for point in points)
        for low, high in _interval_ends(stages)
    ]


def agreement(one: Stages, other: Stages, *, slack: int = 1) -> list[bool] | None:
    """Return whether the intervals of corresponding boundaries of two curves overlap.

    Args:
      one: The stages of one curve, such as of entropies.
      other: The stages of another curve, such as of numbers of neurons.
      slack: Number of layers that may lie between the intervals.

    Returns:
      One answer for each boundary; None if either curve is undecided.
    """
    if one.boundaries is None or other.boundaries is None:
        return None
    pairs = zip(_interval_ends(one), _interval_ends(other), strict=True)
    return [a <= d + slack and c <= b + slack for (a, b), (c, d) in pairs]


def _interval_ends(stages: Stages) -> Iterator[tuple[int, int]]:
    """Return the ends of the interval of each boundary, of stages with enough layers."""
    assert stages.low is not None and stages.high is not None
    return zip(stages.low, stages.high, strict=True)


def _pair(values: np.ndarray) -> tuple[int, int]:
    first, second = values.tolist()
    return first, second


def _curve(curve: np.ndarray) -> np.ndarray:
    curve = checks.finite(curve, "curve", axes="[L]")
    if not len(curve):
        raise ValueError("curve has no layer")
    return curve


def _costs(curves: np.ndarray, min_length: int) -> np.ndarray:
    """Return the squared error of a line through layers [start, stop), float64[R, L + 1, L + 1]."""
    resamples, layers = curves.shape
    centred = curves - curves.mean(axis=1, keepdims=True)
    costs = np.full((resamples, layers + 1, layers + 1), np.inf)
    for length in range(min_length, layers + 1):
        x = np.arange(length) - (length - 1) / 2
        line = x / np.sqrt(x @ x)
        for start in range(layers - length + 1):
            y = centred[:, start : start + length]
            y = y - y.mean(axis=1, keepdims=True)
            y = y - np.einsum("rl,l->r", y, line)[:, None] * line
            costs[:, start, start + length] = (y * y).sum(axis=1)
    return costs


def _split(costs: np.ndarray, min_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best two boundaries and their squared error: int64[R, 2], float64[R]."""
    layers = costs.shape[-1] - 1
    pairs = np.array(
        [
            (first, second)
            for first in range(min_length, layers - 2 * min_length + 1)
            for second in range(first + min_length, layers - min_length + 1)
        ]
    )
    first, second = pairs.T
    total = costs[:, 0, first] + costs[:, first, second] + costs[:, second, layers]
    best = total.argmin(axis=1)
    return pairs[best], total[np.arange(len(total)), best]


def _lines(curve: np.ndarray, boundaries: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Fit a line to each segment: the fitted curve float64[L] and the slopes float64[3]."""
    fit, slopes = np.empty_like(curve), []
    for start, stop in zip((0, *boundaries), (*boundaries, len(curve)), strict=True):
        x = np.arange(stop - start) - (stop - start - 1) / 2
        y = curve[start:stop]
        slopes.append((x * y).sum() / (x * x).sum())
        fit[start:stop] = y.mean() + slopes[-1] * x
    return fit, np.array(slopes)


def _doubt(
    curve: np.ndarray,
    costs: np.ndarray,
    three: float,
    min_length: int,
    low: tuple[int, int],
    high: tuple[int, int],
) -> str | None:
    """Return why the boundaries are undecided; None if they are decided."""
    layers = len(curve)
    # A residual below a millionth of the curve is rounding.
    floor = layers * (1e-6 * np.abs(curve).max()) ** 2
    one = costs[0, layers]
    if one <= floor:
        return "one straight line fits every layer"
    cuts = range(min_length, layers - min_length + 1)
    two = min(costs[0, cut] + costs[cut, layers] for cut in cuts)

    def bic(error: float, segments: int) -> float:
        parameters = 2 * segments + (segments - 1)
        return layers * np.log(max(error, floor) / layers) + parameters * np.log(layers)

    best = min((bic(error, 1 + i), 1 + i) for i, error in enumerate((one, two, three)))[1]
    if best < 3:
        fewer = ("one straight line fits", "two segments fit")[best - 1]
        return f"{fewer} as well as three by BIC"
    for name, a, b in zip(("first", "second"), low, high, strict=True):
        if 3 * (b - a) > layers:
            return f"the {name} boundary lies anywhere between layers {a} and {b}"
    if high[0] >= low[1]:
        return f"the boundaries run into each other (up to {high[0]}, from {low[1]})"
    return None


def _describe(
    slopes: np.ndarray, boundaries: tuple[int, int], curve: np.ndarray
) -> tuple[bool, str]:
    """Return whether segments have the claimed pattern, and describe each in a word.

    Flat is a change below a tenth of the curve's range.
    """
    extent = np.ptp(curve) or 1.0
    changes = slopes * np.diff((0, *boundaries, len(curve))) / extent
    words = ["flat" if abs(c) < 0.1 else "rising" if c > 0 else "falling" for c in changes]
    claimed = words[1:] == ["falling", "rising"] and bool(slopes[1] < slopes[0])
    name = "three stages as claimed" if claimed else "three segments, not the claimed stages"
    return claimed, f"{name} ({', '.join(words)})"
