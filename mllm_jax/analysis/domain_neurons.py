"""Domain-specific neurons by the entropy of their activation probability over domains (DAPE).

A neuron that fires mostly in one domain has a low entropy; one that fires equally often in all of
them has the highest, ln D_. Method: MMNeuron (Huo et al., EMNLP 2024), after LAPE (Tang
et al., ACL 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from mllm_jax.analysis import checks, jaccard


@dataclasses.dataclass(frozen=True, eq=False)
class SelectedNeurons:
    """The domain-specific neurons of one module. D_ domains, L layers, F neurons.

    Attributes:
      entropy: float64[L, F], nats; +inf where a neuron was filtered out. The entropy before the
        filter is `entropy(found.probability)`.
      probability: float64[D_, L, F], share of a domain's tokens on which the neuron is active.
      selected: bool[L, F], the neurons of lowest entropy: `k` of them, or all candidates if those
        are fewer.
      mask: bool[D_, L, F], the domains of each selected neuron. A neuron may have several; a
        domain without neurons keeps its place.
      threshold: A candidate has a probability above this in some domain. A float, or float64[L]
        where each layer has its own.
      bar: A selected neuron belongs to the domains in which its probability exceeds this. A
        float, or float64[L].
      k: The number of neurons that `top_rate` corresponds to; of all modules together, if they
        share thresholds.
    """

    entropy: np.ndarray
    probability: np.ndarray
    selected: np.ndarray
    mask: np.ndarray
    threshold: float | np.ndarray
    bar: float | np.ndarray
    k: int


def select(
    counts: np.ndarray,
    tokens: np.ndarray,
    *,
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_rate: float = 0.95,
    assign: Literal["multiple", "single"] = "multiple",
    names: Sequence[str] = (),
    compat: Literal["official"] | None = None,
) -> SelectedNeurons:
    """Select the domain-specific neurons of one module.

    Rates become ranks by Python's `round` (half to even), ranks count from the smallest value, and
    comparisons are strict. Among equal entropies the neuron with the highest probability in any
    domain comes first, then (layer, neuron) order decides; with compat="official" only the latter.

    Args:
      counts: int[D_, L, F], number of tokens of each domain on which a neuron is active.
      tokens: int[D_], number of tokens of each domain.
      top_rate: Share of all neurons of the module to keep, in (0, 1].
      filter_rate: Quantile of all probabilities (layers, neurons, domains) that a candidate must
        exceed in some domain.
      bar_rate: Quantile that a selected neuron must exceed in a domain to belong to it.
      assign: "multiple", or "single": a neuron belongs only to its most probable domain.
      names: The domains' names, for error messages only.
      compat: "official" divides in float32 and fills up to `k` with neurons that are not
        candidates, as the released code does; see docs/official.md.

    Returns:
      The selected neurons.

    Raises:
      ValueError: There are fewer than two domains, a domain without tokens, shapes that do not
        match, counts that are negative or above the tokens of their domain, a rate outside
        (0, 1], or an unknown option.
    """
    rule = _Rule(top_rate, filter_rate, bar_rate, assign, compat)
    return rule(_probability(counts, tokens, names, rule))


def select_modules(
    counts: Mapping[str, np.ndarray],
    tokens: Mapping[str, np.ndarray],
    *,
    thresholds: Literal["module", "global", "layer"] = "module",
    names: Sequence[str] = (),
    **options: Any,
) -> dict[str, SelectedNeurons]:
    """Select the neurons of several modules, ranked within a layer, a module or all modules.

    Args:
      counts: {module: int[D_, L, F]}; L and F are each module's own.
      tokens: {module: int[D_]}.
      thresholds: "module": each module separately, as in the paper; "global": one ranking, one
        threshold and one bar over all modules; "layer": each layer separately, so that no layer is
        empty.
      names: The domains' names, for error messages only.
      **options: Rates, assign and compat, as in `select`.

    Returns:
      {module: the selected neurons}.
    """
    rule = _Rule(**options)
    if not counts or counts.keys() != tokens.keys():
        raise ValueError(
            f"counts are of {', '.join(counts) or 'no module'}, tokens of "
            f"{', '.join(tokens) or 'none'}: both must be of the same modules"
        )
    probabilities = {m: _probability(counts[m], tokens[m], names, rule) for m in counts}
    if thresholds == "module":
        return {module: rule(p) for module, p in probabilities.items()}
    if thresholds == "layer":
        return {
            module: _join_layers([rule(layer) for layer in np.split(p, p.shape[1], axis=1)])
            for module, p in probabilities.items()
        }
    if thresholds == "global":
        return _select_together(probabilities, rule)
    raise ValueError(f"thresholds={thresholds!r} is not one of 'module', 'global', 'layer'")


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The checked options of `select`; called with probabilities, it selects."""

    top_rate: float = 0.01
    filter_rate: float = 0.95
    bar_rate: float = 0.95
    assign: Literal["multiple", "single"] = "multiple"
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        for name in ("top_rate", "filter_rate", "bar_rate"):
            rate = getattr(self, name)
            if not 0 < rate <= 1:
                raise ValueError(f"{name}={rate} lies outside (0, 1]; 0.01 means one percent")
        if self.assign not in ("multiple", "single"):
            raise ValueError(f"assign={self.assign!r} is neither 'multiple' nor 'single'")
        if self.compat not in (None, "official"):
            raise ValueError(f"compat={self.compat!r} is neither None nor 'official'")

    def __call__(self, probability: np.ndarray) -> SelectedNeurons:
        threshold = _quantile(probability, self.filter_rate, "filter_rate")
        bar = _quantile(probability, self.bar_rate, "bar_rate")

        candidate = (probability > threshold).any(axis=0)
        filtered = np.where(candidate, entropy(probability), np.inf)
        k = round(self.top_rate * filtered.size)
        # Among equal entropies, such as 0, prefer the most active neuron, not the lowest layer.
        ties = np.zeros(filtered.shape) if self.compat else -probability.max(axis=0)
        lowest = np.lexsort((ties.ravel(), filtered.ravel()))[:k]
        selected = np.zeros(filtered.shape, bool)
        selected.flat[lowest] = True
        if not self.compat:
            selected &= candidate
        member = probability > bar
        if self.assign == "single":
            domain = np.arange(len(probability))[:, None, None]
            member &= domain == probability.argmax(axis=0)
        return SelectedNeurons(
            filtered, probability, selected, selected & member, threshold, bar, k
        )


def _probability(
    counts: np.ndarray, tokens: np.ndarray, names: Sequence[str], rule: _Rule
) -> np.ndarray:
    counts, tokens = _checked(counts, tokens, names)
    if rule.compat:  # torch divides integers in float32
        counts, tokens = counts.astype(np.float32), tokens.astype(np.float32)
    return counts / tokens[:, None, None]


def _select_together(
    probabilities: Mapping[str, np.ndarray], rule: _Rule
) -> dict[str, SelectedNeurons]:
    """Select with one ranking, one threshold and one bar over the neurons of all modules."""
    flat = [p.reshape(len(p), 1, -1) for p in probabilities.values()]
    every = rule(np.concatenate(flat, axis=2))
    ends = np.cumsum([p.shape[2] for p in flat])[:-1]

    def of_module(array: np.ndarray, number: int, shape: tuple[int, ...]) -> np.ndarray:
        part = np.split(array, ends, axis=-1)[number]
        return part.reshape(*part.shape[:-2], *shape)

    return {
        module: SelectedNeurons(
            entropy=of_module(every.entropy, number, p.shape[1:]),
            probability=of_module(every.probability, number, p.shape[1:]),
            selected=of_module(every.selected, number, p.shape[1:]),
            mask=of_module(every.mask, number, p.shape[1:]),
            threshold=every.threshold,
            bar=every.bar,
            k=every.k,
        )
        for number, (module, p) in enumerate(probabilities.items())
    }


def _join_layers(layers: Sequence[SelectedNeurons]) -> SelectedNeurons:
    """Join selections of one layer each."""
    return SelectedNeurons(
        np.concatenate([layer.entropy for layer in layers]),
        np.concatenate([layer.probability for layer in layers], axis=1),
        np.concatenate([layer.selected for layer in layers]),
        np.concatenate([layer.mask for layer in layers], axis=1),
        np.array([layer.threshold for layer in layers]),
        np.array([layer.bar for layer in layers]),
        sum(layer.k for layer in layers),
    )


def entropy(probability: np.ndarray) -> np.ndarray:
    """Compute the entropy of each neuron's activation probabilities over the domains (DAPE).

    The probabilities of a neuron are divided by their sum over the domains.

    Args:
      probability: float64[D_, L, F].

    Returns:
      float64[L, F], nats, between 0 and ln D_; 0 for a neuron that is never active.
    """
    probability = checks.numbers(probability, "probability")
    checks.at_least(checks.finite(probability, "probability"), 0, "probability")
    if not np.issubdtype(probability.dtype, np.floating):
        probability = probability.astype(np.float64)
    total = probability.sum(axis=0)
    share = np.divide(probability, total, out=np.zeros_like(probability), where=total > 0)
    return 0.0 - (share * np.log(share, out=np.zeros_like(share), where=share > 0)).sum(axis=0)


def random_like(selection: SelectedNeurons, key: int | jax.Array) -> np.ndarray:
    """Draw a random control of equal size in every layer of every domain, without replacement.

    Args:
      selection: The neurons to match.
      key: An int seed or a JAX PRNG key. The same key gives the same neurons.

    Returns:
      bool[D_, L, F].
    """
    return random_mask_like(selection.mask, key)


def random_mask_like(mask: np.ndarray, key: int | jax.Array) -> np.ndarray:
    """Draw the same number of neurons in every layer as a mask has, without replacement.

    The draw is over all neurons of the layer; those of the mask are not excluded, so that the
    control is the plain null hypothesis "any neurons of these layers".

    Args:
      mask: bool[..., L, F], the neurons to match.
      key: An int seed or a JAX PRNG key.

    Returns:
      bool[..., L, F].
    """
    mask = checks.mask(mask, "mask")
    neurons = np.broadcast_to(np.arange(mask.shape[-1]), mask.shape)
    counts = mask.sum(axis=-1, keepdims=True)
    return generator(key).permuted(neurons, axis=-1) < counts


def generator(key: int | jax.Array) -> np.random.Generator:
    """Return NumPy's generator for an int seed or a JAX PRNG key."""
    seed = key if isinstance(key, int) else [int(word) for word in jax.random.key_data(key).ravel()]
    return np.random.default_rng(seed)


def per_layer(selection: SelectedNeurons) -> np.ndarray:
    """Count the neurons of each domain in each layer: int64[D_, L]."""
    return selection.mask.sum(axis=-1)


def domains_per_neuron(selection: SelectedNeurons) -> np.ndarray:
    """Count the selected neurons that belong to 0, 1, ... D_ domains: int64[D_ + 1]."""
    domains = selection.mask.sum(axis=0)[selection.selected]
    return np.bincount(domains, minlength=len(selection.mask) + 1)


def overlap(selection: SelectedNeurons) -> np.ndarray:
    """Return the Jaccard index of every two domains, float64[D_, D_]; 0 where both are empty."""
    members = selection.mask.reshape(len(selection.mask), -1).astype(np.int64)
    both = members @ members.T
    sizes = members.sum(axis=1)
    return jaccard.index(both, sizes[:, None], sizes)


def _quantile(probability: np.ndarray, rate: float, name: str) -> float:
    """Return the round(rate * size)-th smallest value."""
    rank = round(rate * probability.size)
    if rank == 0:
        raise ValueError(
            f"{name}={rate} of {probability.size} values rounds to rank 0; raise {name}"
        )
    return float(np.partition(probability, rank - 1, axis=None)[rank - 1])


def _checked(
    counts: np.ndarray, tokens: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    counts, tokens = np.asarray(counts), np.asarray(tokens)
    if counts.ndim != 3 or 0 in counts.shape[1:]:
        raise ValueError(f"counts must be [domains, layers, neurons], not of shape {counts.shape}")
    if tokens.shape != counts.shape[:1]:
        raise ValueError(
            f"tokens must be [{len(counts)}], one number per domain, not of shape {tokens.shape}"
        )
    if len(counts) < 2:
        raise ValueError(f"domain-specific neurons need at least two domains, got {len(counts)}")
    if names and len(names) != len(counts):
        raise ValueError(f"{len(names)} names for {len(counts)} domains")
    if not all(np.issubdtype(array.dtype, np.integer) for array in (counts, tokens)):
        raise ValueError(
            f"counts and tokens must be integers, not {counts.dtype} and {tokens.dtype}"
        )
    if (counts < 0).any():
        raise ValueError("counts has negative entries; were they summed in a type too narrow?")
    for domain in np.flatnonzero(tokens <= 0).tolist():
        name = repr(names[domain]) if names else domain
        raise ValueError(
            f"domain {name} has {tokens[domain]} tokens; leave it out or give it examples"
        )
    if (above := counts > tokens[:, None, None]).any():
        d, layer, neuron = np.argwhere(above)[0].tolist()
        name = repr(names[d]) if names else d
        raise ValueError(
            f"counts{[d, layer, neuron]} is {counts[d, layer, neuron]}, but domain {name} has "
            f"{tokens[d]} tokens: a neuron is active on a token once at most"
        )
    return counts, tokens
