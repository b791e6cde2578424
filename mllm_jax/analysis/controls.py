"""Control neurons that match others by layer and by activation rate.

Random neurons of the same layers control for the number of neurons only: domain neurons are active
on most tokens of their domain, random ones often on half of them. These draws are equally active:

    matched = controls.rate_matched(selection.mask, selection.probability, mean, draws=10)
    matched.mask[0]      # bool[D_, L, F], the first draw
    matched.unmatched()  # (domain, layer) without enough such neurons
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from mllm_jax.analysis import checks, domain_neurons
from mllm_jax.typing import Bool, Float, Int

ATTEMPTS = 20  # exchanges of single neurons can end in a local optimum
TOLERANCE = 0.02  # the difference of mean activation rates that counts as matched


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """Control neurons for given neurons. R draws, D_ domains, L layers, F neurons.

    Attributes:
      mask: bool[R, D_, L, F], the neurons of each draw.
      rate: float64[D_, L], the mean activation rate of the neurons to match; NaN for none.
      drawn_rate: float64[R, D_, L], that of each draw; NaN where a draw has no neuron.
      missing: int64[D_, L], the number of neurons that a draw lacks because the layer has too few
        others; if draws differ, that of the smallest.
      tolerance: The difference of mean rates that counts as matched.
    """

    mask: Bool[np.ndarray, "draws domains layers neurons"]
    rate: Float[np.ndarray, "domains layers"]
    drawn_rate: Float[np.ndarray, "draws domains layers"]
    missing: Int[np.ndarray, "domains layers"]
    tolerance: float

    @property
    def difference(self) -> Float[np.ndarray, "domains layers"]:
        """The mean rate of all draws minus that of the neurons; NaN where either has none."""
        return self.drawn_rate.mean(axis=0) - self.rate

    def unmatched(self) -> list[tuple[int, int]]:
        """Return each (domain, layer) that misses the tolerance or lacks neurons."""
        beyond = np.abs(self.difference) > self.tolerance
        return [(int(d), int(layer)) for d, layer in np.argwhere(beyond | (self.missing > 0))]


def rate_matched(
    mask: np.ndarray,
    rate: np.ndarray,
    mean: np.ndarray | None = None,
    *,
    draws: int = 10,
    key: int | jax.Array = 0,
    exclude: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> Control:
    """Draw neurons of the same layers with nearly the same activation rates and activations.

    Each neuron's rate, moved at random by at most the tolerance, is paired with the nearest rate of
    the layer's other neurons, without replacement within a draw. Neurons are then exchanged as long
    as that brings the mean rate of the draw closer to that of the neurons; if the tolerance is not
    reached, a few more attempts start from larger random moves. A layer may lack such neurons, or
    have too few of any rate: the draws come as close as they can, and the result states the
    remaining difference. Finally, neurons are exchanged for others of similar rates as long as that
    brings the mean activation of the draw closer.

    Args:
      mask: bool[D_, L, F], the neurons to match.
      rate: float[D_, L, F], the share of a domain's tokens on which a neuron is active.
      mean: float[D_, L, F], the mean activation of a neuron on them; None matches rates alone.
      draws: Number of draws.
      key: An int seed or a JAX PRNG key. The same key gives the same draws.
      exclude: bool[L, F], neurons that no draw may hold; by default those of any domain's mask.
      tolerance: The difference of mean rates that counts as matched, between 0 and 1.

    Returns:
      The draws, with their rates.

    Raises:
      ValueError: Shapes differ, a rate lies outside [0, 1], or there is no draw.
    """
    mask = checks.mask(mask, "mask")
    rate = checks.at_least(checks.finite(rate, "rate", axes="[D_, L, F]"), 0, "rate")
    if mask.shape != rate.shape or (rate > 1).any():
        raise ValueError(
            f"rate must be shares between 0 and 1 in the shape of mask {mask.shape}, got "
            f"{rate.shape} up to {rate.max(initial=0):g}"
        )
    mean = np.zeros(rate.shape) if mean is None else checks.finite(mean, "mean", axes="[D_, L, F]")
    if mean.shape != rate.shape:
        raise ValueError(f"mean must be of the shape of rate {rate.shape}, not {mean.shape}")
    if draws < 1 or not 0 < tolerance < 1:
        raise ValueError(f"draws={draws} must be 1 or more and tolerance={tolerance} in (0, 1)")
    excluded = np.asarray(mask.any(axis=0)) if exclude is None else checks.mask(exclude, "exclude")
    if excluded.shape != mask.shape[1:]:
        raise ValueError(f"exclude must be of shape {mask.shape[1:]}, not {excluded.shape}")
    rng = domain_neurons.generator(key)
    drawn = np.zeros((draws, *mask.shape), bool)
    for d, layer in np.argwhere(mask.any(axis=-1)).tolist():
        members = mask[d, layer]
        others = np.flatnonzero(~(excluded[layer] | members))
        wanted, offered = rate[d, layer, members], rate[d, layer, others]
        total = float(mean[d, layer, members].sum())
        for draw in drawn[:, d, layer]:
            taken = _draw(wanted, offered, tolerance, rng)
            if mean[d, layer].any():
                levels = mean[d, layer, others]
                taken = _match_means(taken, offered, levels, float(wanted.sum()), total, tolerance)
            draw[others[taken]] = True
    return compare(mask, rate, drawn, tolerance=tolerance)


def high_entropy(
    mask: np.ndarray,
    entropy: np.ndarray,
    *,
    draws: int = 3,
    key: int | jax.Array = 0,
    share: float = 0.25,
) -> Bool[np.ndarray, "draws domains layers neurons"]:
    """Draw neurons of the same layers that are equally active in all domains.

    Args:
      mask: bool[D_, L, F], the neurons to match; no draw holds neurons of any domain's mask.
      entropy: float[L, F], of the activation rates over domains, `domain_neurons.entropy`.
      draws: Number of draws.
      key: An int seed or a JAX PRNG key. The same key gives the same draws.
      share: The share of the layer's other neurons, those of highest entropy, to draw from; larger
        if the mask has more neurons than that.

    Returns:
      The draws; a layer with too few other neurons gives all of them.
    """
    mask = checks.mask(mask, "mask")
    entropy = checks.finite(entropy, "entropy", axes="[L, F]")
    if entropy.shape != mask.shape[1:] or draws < 1 or not 0 < share <= 1:
        raise ValueError(
            f"entropy must be of shape {mask.shape[1:]}, not {entropy.shape}, draws={draws} 1 or "
            f"more, and share={share} in (0, 1]"
        )
    rng, selected = domain_neurons.generator(key), np.asarray(mask.any(axis=0))
    drawn = np.zeros((draws, *mask.shape), bool)
    for d, layer in np.argwhere(mask.any(axis=-1)).tolist():
        others, needed = np.flatnonzero(~selected[layer]), int(mask[d, layer].sum())
        size = max(needed, math.ceil(share * len(others)))
        highest = others[np.argsort(-entropy[layer, others], kind="stable")[:size]]
        for draw in drawn[:, d, layer]:
            draw[rng.permutation(highest)[:needed]] = True
    return drawn


def compare(
    mask: np.ndarray, rate: np.ndarray, drawn: np.ndarray, *, tolerance: float = TOLERANCE
) -> Control:
    """Compare the activation rates of draws of any kind with those of the neurons.

    Args:
      mask: bool[D_, L, F], the neurons.
      rate: float[D_, L, F], the share of a domain's tokens on which a neuron is active.
      drawn: bool[R, D_, L, F], the draws.
      tolerance: The difference of mean rates that counts as matched.
    """
    missing = mask.sum(axis=-1) - drawn.sum(axis=-1).min(axis=0)
    rates = mean_rate(mask, rate), mean_rate(drawn, rate)
    return Control(drawn, *rates, missing, float(tolerance))


def mean_rate(mask: np.ndarray, rate: np.ndarray) -> Float[np.ndarray, "*lead layers"]:
    """Return the mean activation rate of the neurons of each layer; NaN where it has none.

    Args:
      mask: bool[..., D_, L, F].
      rate: float[D_, L, F].
    """
    count = mask.sum(axis=-1)
    total = np.where(mask, rate, 0).sum(axis=-1, dtype=np.float64)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _draw(
    wanted: np.ndarray, offered: np.ndarray, tolerance: float, rng: np.random.Generator
) -> np.ndarray:
    """Return the indices of offered rates that match the wanted ones in one draw."""
    if len(offered) <= len(wanted):
        return np.arange(len(offered))
    shuffled = rng.permutation(len(offered))  # so that equal rates are taken at random
    order = shuffled[np.argsort(offered[shuffled], kind="stable")]
    rates, total, slack = offered[order], float(wanted.sum()), tolerance * len(wanted)
    best, least = np.zeros(len(rates), bool), np.inf
    for attempt in range(1, ATTEMPTS + 1):
        moved = np.sort(wanted + attempt * rng.uniform(-tolerance, tolerance, len(wanted)))
        taken = np.zeros(len(rates), bool)
        taken[_distinct(_nearest(rates, moved), len(rates))] = True
        _exchange(taken, rates, total, slack)
        missed = abs(float(rates[taken].sum()) - total)
        if missed < least:
            best, least = taken, missed
        if least <= slack:
            break
    return order[best]


def _match_means(
    taken: np.ndarray,
    rates: np.ndarray,
    means: np.ndarray,
    total_rate: float,
    total: float,
    tolerance: float,
) -> np.ndarray:
    """Exchange taken neurons for others until the sum of their means is near a total.

    An exchange is between rates that differ by at most the tolerance, and moves the mean rate no
    farther outside of it. Exchanges end when the sum is within that share of the total, or when
    none brings it closer.

    Args:
      taken: int[n], the neurons to begin with.
      rates: float[F], the activation rate of each neuron.
      means: float[F], its mean activation.
      total_rate: The sum of rates to keep.
      total: The sum of means to reach.
      tolerance: The tolerance of rates.

    Returns:
      int[n], the neurons.
    """
    taken, left = taken.copy(), np.setdiff1d(np.arange(len(rates)), taken)
    slack = max(tolerance * len(taken), abs(float(rates[taken].sum()) - total_rate))
    for _ in range(len(taken) if len(left) else 0):
        excess = float(means[taken].sum()) - total
        if abs(excess) <= tolerance * abs(total):
            break
        steps = rates[left] - rates[taken][:, None]
        moved = np.abs(excess + means[left] - means[taken][:, None])
        kept = np.abs(float(rates[taken].sum()) - total_rate + steps) <= slack
        moved[(np.abs(steps) > tolerance) | ~kept] = np.inf
        i, j = np.unravel_index(moved.argmin(), moved.shape)
        if moved[i, j] >= abs(excess) * (1 - 1e-9):
            break
        taken[i], left[j] = left[j], taken[i]
    return taken


def _nearest(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the index of the nearest of sorted values for each wanted one."""
    right = np.searchsorted(values, wanted).clip(0, len(values) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(wanted - values[left] <= values[right] - wanted, left, right)


def _distinct(places: np.ndarray, size: int) -> np.ndarray:
    """Spread sorted places below `size`, some of them equal, to the nearest distinct ones.

    Moving them only up or only down makes them distinct; so does the mean of both.
    """
    steps = np.arange(len(places))
    base, room = places - steps, size - len(places)
    up = np.maximum.accumulate(base).clip(0, room)
    down = np.minimum.accumulate(base[::-1])[::-1].clip(0, room)
    return (up + down) // 2 + steps


def _exchange(taken: np.ndarray, rates: np.ndarray, total: float, slack: float) -> None:
    """Exchange taken for other rates in place, until their sum is within `slack` of a total.

    Each step is the best exchange of one rate; steps end when none brings the sum closer.
    """
    while abs(excess := float(rates[taken].sum()) - total) > slack:
        inside, outside = np.flatnonzero(taken), np.flatnonzero(~taken)
        partner = outside[_nearest(rates[outside], rates[inside] - excess)]
        left = np.abs(excess + rates[partner] - rates[inside])
        best = int(left.argmin())
        if left[best] >= abs(excess) * (1 - 1e-9):
            return
        taken[[inside[best], partner[best]]] = False, True
