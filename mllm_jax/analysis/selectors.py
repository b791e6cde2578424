"""Ways to rank the neurons of domains: scores, from which `top` selects the highest.

A selector is a function of arrays that returns float64[D_, L, F]: the higher, the more a neuron
belongs to the domain; -inf where it does not belong to it. D_ domains, L layers, F neurons, N
examples. Everything is computed in float64, and inputs must be finite.

    scores = {
        "entropy": selectors.entropy(counts, tokens),
        "AUROC": selectors.auroc(responses, domain),  # with few examples: ties=effect_size(...)
        "random": selectors.random(counts.shape, seed),
    }
    masks = {name: selectors.top(s, k) for name, s in scores.items()}   # bool[D_, L, F]
    selectors.overlap(masks)                                            # agreement of each pair
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mllm_jax.analysis import checks, domain_neurons, jaccard


def entropy(counts: np.ndarray, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """Score neurons above the bar by minus their entropy over domains (DAPE, LAPE).

    `top(entropy(counts, tokens), select(counts, tokens).mask.sum((1, 2)))` is the mask of `select`.

    Args:
      counts: int[D_, L, F], number of tokens of each domain on which a neuron is active.
      tokens: int[D_], number of tokens of each domain.
      **options: filter_rate, bar_rate, assign and compat, as in `domain_neurons.select`.
    """
    selection = domain_neurons.select(counts, tokens, top_rate=1.0, **options)
    return np.where(selection.mask, -selection.entropy.astype(np.float64), -np.inf)


def auroc(responses: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Score how well a neuron separates a domain from all others (Suau et al., AurA, 2024).

    Args:
      responses: float[N, L, F], of each example, such as the largest activation over its tokens.
      domain: int[N], each example's domain, 0 to D_ - 1.

    Returns:
      The area under the ROC curve, 0 to 1, float64[D_, L, F]; 0.5 is chance. Equal responses
      count half.
    """
    responses, domain, domains = _labelled(responses, domain)
    out = np.empty((domains, *responses.shape[1:]))
    sizes = np.bincount(domain, minlength=domains)
    for layer in range(responses.shape[1]):  # ranks of one layer at a time
        ranks = _ranks(responses[:, layer])
        for d in range(domains):
            inside, outside = sizes[d], len(domain) - sizes[d]
            above = ranks[domain == d].sum(axis=0) - inside * (inside + 1) / 2
            out[d, layer] = above / (inside * outside)
    return out


def aura_gain(auroc: np.ndarray) -> np.ndarray:
    """Return AurA's factor of each neuron: 1 - 2 (AUROC - 0.5) for experts, 1 for all others.

    Args:
      auroc: float[...], of one domain, as `auroc` returns it.

    Returns:
      float64[...], 0 to 1, for `mj.scale(site, gain)`.
    """
    auroc = checks.finite(auroc, "auroc")
    if ((auroc < 0) | (auroc > 1)).any():
        raise ValueError("auroc must lie in [0, 1]")
    return np.minimum(1.0, 1.0 - 2.0 * (auroc - 0.5))


# Activations are summed in float32. The rounding of sums of squares and of sums, relative to them:
SQUARES_LOSE = 4 * float(np.finfo(np.float32).eps)
SUMS_LOSE = 1e-5


def mean_difference(
    sums: np.ndarray,
    squares: np.ndarray | None,
    tokens: np.ndarray,
    *,
    centred: np.ndarray | None = None,
) -> np.ndarray:
    """Score the mean activation in a domain minus that in all other domains together.

    Args:
      sums: float[D_, L, F], sum of the activations over tokens.
      squares: float[D_, L, F], sum of their squares. With it, or with `centred`, the difference
        is measured in standard deviations (within the two groups, pooled over tokens);
        otherwise in activations.
      tokens: int[D_], number of tokens of each domain.
      centred: float[D_, L, F], sum of squared deviations from each domain's mean, as `mj.stats`
        returns it: more accurate than `squares` where the mean is large.

    Returns:
      The difference, always finite. A standard deviation below what float32 sums resolve, 7e-4 of
      the activations by `squares` and 1e-5 of them by `centred`, counts as that much: a neuron
      that is constant up to rounding scores about 0.
    """
    sums = checks.finite(sums, "sums", axes="[D_, L, F]")
    tokens = checks.finite(tokens, "tokens", axes="[D_]")
    domains = len(sums)
    if tokens.shape != sums.shape[:1] or (tokens <= 0).any() or domains < 2:
        raise ValueError(
            f"tokens must be {domains} positive numbers, one per domain, of two or more"
        )
    means, counts = sums / tokens[:, None, None], tokens[:, None, None]
    others = [np.delete(np.arange(domains), d) for d in range(domains)]
    rest = np.stack([(sums[o] / tokens[o].sum()).sum(axis=0) for o in others])
    difference = means - rest
    if squares is None and centred is None:
        return difference
    own = _deviations(means, counts, squares, centred)
    between = [(counts[o] * (means[o] - rest[d]) ** 2).sum(axis=0) for d, o in enumerate(others)]
    spread = np.sqrt((own.sum(axis=0) + np.stack(between)) / tokens.sum())
    return np.divide(difference, spread, out=np.zeros_like(difference), where=spread > 0)


def _deviations(
    means: np.ndarray,
    counts: np.ndarray,
    squares: np.ndarray | None,
    centred: np.ndarray | None,
) -> np.ndarray:
    """Return the squared deviations from each domain's mean, no less than rounding resolves."""
    name, values = ("squares", squares) if centred is None else ("centred", centred)
    values = checks.at_least(checks.finite(values, name), 0, name)
    if values.shape != means.shape:
        raise ValueError(f"{name} must be of the shape of sums {means.shape}, not {values.shape}")
    power = counts * means**2
    if centred is None:
        return np.maximum(values - power, SQUARES_LOSE * values)
    return np.maximum(values, SUMS_LOSE**2 * power)


def weight_change(before: np.ndarray, after: Sequence[np.ndarray]) -> np.ndarray:
    """Score 1 - cosine of a neuron's weights before and after training on a domain (NeFT, 2024).

    Args:
      before: float[L, F, D], each neuron's weights, such as the columns of `up` transposed.
      after: [D_] of float[L, F, D], the weights of the model that was trained on each domain.

    Returns:
      float64[D_, L, F], 0 to 2; 1 where either is zero and the other is not.

    Raises:
      ValueError: Shapes differ, or weights are not finite.
    """
    before = checks.finite(before, "before")
    after = [checks.finite(weights, f"after[{d}]") for d, weights in enumerate(after)]
    if before.ndim != 3 or not after or any(weights.shape != before.shape for weights in after):
        raise ValueError(
            f"weights must be [L, F, D] alike, got {before.shape} before and "
            f"{[np.shape(weights) for weights in after]} after"
        )
    return np.stack([_one_minus_cosine(before, weights) for weights in after])


def attribution(attributions: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Score the mean absolute attribution in a domain minus that in all other domains together.

    Args:
      attributions: float[N, L, F], of each example: the gradient of its metric with respect to
        the neurons' gates, or that times the activation.
      domain: int[N], each example's domain.
    """
    attributions, domain, domains = _labelled(attributions, domain)
    size, sizes = np.abs(attributions), np.bincount(domain, minlength=domains)
    sums = np.stack([size[domain == d].sum(axis=0) for d in range(domains)])
    return mean_difference(sums, None, sizes)


def random(shape: Sequence[int], key: int | jax.Array) -> np.ndarray:
    """Draw random scores: the control.

    Args:
      shape: (D_, L, F).
      key: An int seed or a JAX PRNG key.
    """
    return domain_neurons.generator(key).random(tuple(shape))


def effect_size(responses: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Score the mean response in a domain minus that in all others, in standard deviations.

    It orders neurons that `auroc` cannot tell apart, of which there are many where examples are
    few: `top(auroc(responses, domain), k, ties=effect_size(responses, domain))`.

    Args:
      responses: float[N, L, F], as in `auroc`.
      domain: int[N], each example's domain.
    """
    responses, domain, domains = _labelled(responses, domain)
    groups = [responses[domain == d] for d in range(domains)]
    sums = np.stack([group.sum(axis=0) for group in groups])
    centred = np.stack([((group - group.mean(axis=0)) ** 2).sum(axis=0) for group in groups])
    return mean_difference(sums, None, np.array([len(group) for group in groups]), centred=centred)


def top(
    scores: np.ndarray,
    k: int | Sequence[int],
    *,
    per_layer: bool = False,
    ties: np.ndarray | None = None,
) -> np.ndarray:
    """Select the neurons of highest score.

    Args:
      scores: float[D_, L, F].
      k: Number of neurons of each domain, over all layers: an int, or [D_].
      per_layer: Whether to select k in every layer.
      ties: float[D_, L, F], second scores that order equal scores, highest first, such as the size
        of the effect.

    Returns:
      bool[D_, L, F]. Scores that are equal, also in `ties`, are ordered by (layer, neuron): without
      `ties`, lower layers are preferred. A score of -inf is never selected.
    """
    scores = checks.not_nan(scores, "scores", axes="[D_, L, F]")
    second = np.zeros(scores.shape) if ties is None else checks.not_nan(ties, "ties")
    if second.shape != scores.shape:
        raise ValueError(f"ties must be of the shape of scores {scores.shape}, not {second.shape}")
    flat = scores if per_layer else scores.reshape(len(scores), 1, -1)
    counts = np.broadcast_to(checks.integers(k, "k"), len(scores))
    if (counts < 0).any() or (counts > flat.shape[-1]).any():
        raise ValueError(f"k={counts.tolist()} must lie between 0 and the {flat.shape[-1]} neurons")
    order = np.lexsort((-second.reshape(flat.shape), -flat), axis=-1)
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, order, np.arange(flat.shape[-1]) < counts[:, None, None], axis=-1)
    return mask.reshape(scores.shape) & (scores > -np.inf)


class Overlap(NamedTuple):
    """The agreement of S selectors.

    Attributes:
      names: Names of the selectors, in the order of the axes.
      jaccard: float64[D_, S, S], Jaccard index of the neurons of two selectors.
      chance: float64[D_, S, S], that of random sets of these sizes.
      selectors_per_neuron: int64[D_, S + 1], number of neurons that 0, 1, ... S selectors select.
    """

    names: tuple[str, ...]
    jaccard: np.ndarray
    chance: np.ndarray
    selectors_per_neuron: np.ndarray

    def rows(self, domains: Sequence[str]) -> list[tuple[str, str, str, float, float]]:
        """Return a table of (domain, selector, selector, Jaccard, chance), each pair once."""
        pairs = [(a, b) for a in range(len(self.names)) for b in range(a)]
        return [
            (domain, self.names[b], self.names[a],
             float(self.jaccard[d, a, b]), float(self.chance[d, a, b]))
            for d, domain in enumerate(domains)
            for a, b in pairs
        ]  # fmt: skip


def overlap(masks: Mapping[str, np.ndarray]) -> Overlap:
    """Compute the agreement of selectors; `report.figures.overlap` draws it.

    Args:
      masks: {selector: bool[D_, L, F]}.
    """
    if len(masks) < 2 or len({np.shape(mask) for mask in masks.values()}) != 1:
        shapes = {name: np.shape(mask) for name, mask in masks.items()}
        raise ValueError(f"overlap needs two or more masks of one shape, got {shapes}")
    members = np.stack([checks.mask(m, f"the mask of {n}") for n, m in masks.items()], axis=1)
    members = members.reshape(*members.shape[:2], -1)  # [D_, S, neurons]
    integers = members.astype(np.int64)
    both = np.einsum("dsn,dtn->dst", integers, integers)
    sizes = integers.sum(axis=-1)
    pair = sizes[:, :, None], sizes[:, None, :]
    taken = members.sum(axis=1)
    counts = np.stack([np.bincount(row, minlength=len(masks) + 1) for row in taken])
    return Overlap(
        tuple(masks),
        jaccard.index(both, *pair),
        jaccard.by_chance(*pair, members.shape[-1]),
        counts,
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1 along the first axis; equal values share their mean rank."""
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    place = np.arange(len(values))[:, None]
    new = np.ones(ordered.shape, bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(new, place, 0), axis=0)
    ends = np.roll(new, -1, axis=0)
    ends[-1] = True
    last = np.where(ends, place, len(values))
    last = np.minimum.accumulate(last[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=0)
    return ranks


def _one_minus_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute half the squared distance of the unit vectors, which is accurate near zero."""
    # Scale before squaring: very large and very small vectors would overflow or underflow.
    largest = [np.abs(x).max(axis=-1, keepdims=True, initial=0) for x in (a, b)]
    a, b = (x / np.where(n > 0, n, 1) for x, n in zip((a, b), largest, strict=True))
    lengths = [np.sqrt((x * x).sum(axis=-1, keepdims=True)) for x in (a, b)]
    units = [np.divide(x, n, out=np.zeros_like(x), where=n > 0)
             for x, n in zip((a, b), lengths, strict=True)]  # fmt: skip
    chord = ((units[0] - units[1]) ** 2).sum(axis=-1) / 2
    none = (lengths[0] > 0) != (lengths[1] > 0)
    return np.where(none[..., 0], 1.0, chord)


def _labelled(values: np.ndarray, domain: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    values = checks.finite(values, "values", axes="[N, L, F]")
    domain = checks.numbers(domain, "domain")
    if domain.shape != values.shape[:1] or not np.issubdtype(domain.dtype, np.integer):
        raise ValueError(f"domain must be {len(values)} integers, one per example")
    if not domain.size:
        raise ValueError("values and domain are of no example")
    domains = int(domain.max()) + 1
    if domain.min() < 0 or domains < 2 or (np.bincount(domain, minlength=domains) == 0).any():
        raise ValueError("every domain from 0 up needs examples, and there must be two or more")
    return values, domain, domains
