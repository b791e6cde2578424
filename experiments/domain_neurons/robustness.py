"""Test how much a selection depends on its rule and sample, and whether it exceeds chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.domain_neurons import selection
from experiments.domain_neurons.context import Study
from mllm_jax.analysis import domain_neurons, jaccard, selectors
from mllm_jax.analysis import stability as stability_
from mllm_jax.analysis.domain_neurons import SelectedNeurons

RELEASED: dict[str, Any] = {"prompts": "released", "scope": "all"}


def compare(
    study: Study, counted: selection.Counted, neurons: Mapping[str, SelectedNeurons]
) -> dict[str, Any]:
    """Return how many neurons other selectors, and other settings of the rule, share."""
    rule = selection.rule(study.config)
    names = tuple(dict.fromkeys((rule.selector, *study.config.compare)))
    if len(names) < 2:
        return {}
    by_selector = {names[0]: neurons} | {
        name: selection.select(study, counted, dataclasses.replace(rule, selector=name))
        for name in names[1:]
    }
    shared = {
        module: selectors.overlap({name: by_selector[name][module].mask for name in names})
        for module in neurons
    }
    settings = [
        (field, value)
        for field, values in selection.SETTINGS.items()
        for value in values
        if value != getattr(rule, field)
    ]
    selected = (
        selection.select(
            study, counted, dataclasses.replace(rule, **dict[str, Any]({field: value}))
        )
        for field, value in settings
    )
    return {
        "selectors": list(names),
        "modules": {
            module: {
                "jaccard": overlap.jaccard.tolist(),
                "chance": overlap.chance.tolist(),
                "selectors_per_neuron": overlap.selectors_per_neuron.tolist(),
            }
            for module, overlap in shared.items()
        },
        "settings": [
            _setting(field, value, neurons, others)
            for (field, value), others in zip(settings, selected, strict=True)
        ],
    }


def _setting(
    field: str,
    value: str,
    neurons: Mapping[str, SelectedNeurons],
    others: Mapping[str, SelectedNeurons],
) -> dict[str, Any]:
    """Return the Jaccard index with the study's own neurons, mean over domains, by module."""
    return {
        "field": field,
        "value": value or "default",
        "jaccard": {
            module: float(jaccard.of_masks(neurons[module].mask, other.mask).mean())
            for module, other in others.items()
        },
        "selected": {module: int(other.selected.sum()) for module, other in others.items()},
    }


def released(
    study: Study, counted: selection.Counted, neurons: Mapping[str, SelectedNeurons]
) -> dict[str, Any]:
    """Return the selection by released prompts and all tokens, and how many neurons it shares.

    The domain's own questions name what its pictures show, and their tokens are counted, so that
    neurons that respond to words rather than pictures are selected as well.

    Returns:
      `prompts`, `scope` and, by module, the entries of `selection.describe` with `jaccard` and
      `chance`, the share of common neurons of each domain and that of random sets of these sizes;
      {} if this is the study's own selection.
    """
    rule = selection.rule(study.config)
    other = dataclasses.replace(rule, **RELEASED)
    if other == rule:
        return {}
    modules: dict[str, dict[str, Any]] = {}
    for module, selected in selection.select(study, counted, other).items():
        shared = selectors.overlap({"own": neurons[module].mask, "released": selected.mask})
        modules[module] = {
            **selection.describe(study, selected),
            "jaccard": shared.jaccard[:, 0, 1].tolist(),
            "chance": shared.chance[:, 0, 1].tolist(),
        }
    return {"own": {key: getattr(rule, key) for key in RELEASED}, **RELEASED, "modules": modules}


def stability(study: Study, counted: selection.Counted, module: str) -> dict[str, Any]:
    """Test whether the entropy selects the same neurons in other examples, and more than chance.

    Groups of examples are split into halves, resampled, and assigned to domains at random. Each
    module is tested on its own, also with "global" thresholds.

    Returns:
      The entry of the module in results.json; {} if a domain has a single group.
    """
    resampled = resample(study, counted, module)
    if resampled is None:
        return {}
    groups = int(np.bincount(resampled.domain).min())
    examples = min(len(study.questions("train", name).pairs) for name in study.names)
    return {
        "examples": [round(size * examples / groups) for size in resampled.sizes],
        "halves": resampled.halves.tolist(),
        "bootstrap": {key: getattr(resampled, key).tolist() for key in ("value", "low", "high")},
        "stable": int(resampled.stable),
        "level": study.config.level,
        **_beyond_chance(study, shuffle_test(study, counted, module)),
    }


class Resampled(NamedTuple):
    """Selections of halves of the groups, and of resamples of all groups, of a module.

    Attributes:
      domain: int64[N], the domain of each group.
      sizes: int64[S], the number of groups of a domain in a half.
      halves: float64[S, D_], the Jaccard index of two halves.
      value: float64[D_], the Jaccard index of a resample with the selection of all groups.
      low: float64[D_], the lower end of its interval.
      high: float64[D_], the upper end of it.
      stable: int64[], the number of neurons in 95 % of the resamples.
      per_layer: int64[R, D_, L], the number of neurons in each resample.
    """

    domain: np.ndarray
    sizes: np.ndarray
    halves: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    stable: np.ndarray
    per_layer: np.ndarray


def resample(study: Study, counted: selection.Counted, module: str) -> Resampled | None:
    """Split and resample the groups of a module; None if a domain has a single group."""
    config, rule = study.config, selection.rule(study.config)
    counts = selection.counts_of(study, counted, module)
    groups = int(np.bincount(counts.domain).min())
    if groups < 2 or not config.shuffles:
        return None

    def select(positive: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        selected = domain_neurons.select_modules(
            {module: positive}, {module: tokens}, thresholds=rule.thresholds,
            **selection.options(config, rule),
        )  # fmt: skip
        return selected[module].mask

    def make() -> dict[str, np.ndarray]:
        data = (counts.positive, counts.tokens, counts.domain)
        sizes = sorted({max(1, groups // (2 * part)) for part in (1, 2, 4)})
        halves = stability_.split_half(*data, sizes=sizes, repeats=config.splits, select=select)
        drawn = stability_.bootstrap(*data, resamples=config.resamples, select=select)
        stable = np.asarray((drawn.frequency >= 0.95).any(axis=0).sum())
        return Resampled(
            counts.domain, halves.sizes, halves.jaccard.mean(axis=1), *drawn.jaccard, stable,
            drawn.per_layer,
        )._asdict()  # fmt: skip

    return Resampled(**study.workdir.arrays(f"resamples-{module}", make))


class Shuffled(NamedTuple):
    """The test of a module's neurons against shuffled domains.

    Attributes:
      mask: bool[D_, L, F], the selected neurons whose entropy is lower than by chance.
      p_values: float64[L, F], corrected for all neurons of the module.
      lowest: float64[], the lowest entropy of all neurons, nats.
      shuffled: float64[R], the lowest entropy in each shuffle.
    """

    mask: np.ndarray
    p_values: np.ndarray
    lowest: np.ndarray
    shuffled: np.ndarray


def shuffle_test(study: Study, counted: selection.Counted, module: str) -> Shuffled | None:
    """Test the neurons of a module; None if there are too few groups or shuffles."""
    config, rule = study.config, selection.rule(study.config)
    counts = selection.counts_of(study, counted, module)
    power = stability_.power(counts.domain, config.shuffles, config.level)
    if not config.shuffles or power < stability_.POWER:
        return None

    def make() -> dict[str, np.ndarray]:
        test = stability_.shuffle_test(
            counts.positive, counts.tokens, counts.domain, shuffles=config.shuffles,
            level=config.level, **selection.options(config, rule),
        )  # fmt: skip
        lowest = test.selection.entropy.min()
        return Shuffled(test.mask, test.p_values, np.asarray(lowest), test.lowest)._asdict()

    return Shuffled(**study.workdir.arrays(f"shuffles-{module}", make))


def tested(study: Study, counted: selection.Counted) -> dict[str, SelectedNeurons]:
    """Return the neurons of every module that are beyond chance; {} if none can be tested."""
    tests = {module: shuffle_test(study, counted, module) for module in study.shapes}
    return {module: selection.from_mask(test.mask) for module, test in tests.items() if test}


def _beyond_chance(study: Study, test: Shuffled | None) -> dict[str, Any]:
    """Return the results of a test; None if there was no test."""
    if test is None:
        return dict.fromkeys(
            ("lowest_entropy", "shuffled_entropy", "beyond_chance", "beyond_chance_per_domain")
        )
    shuffled = np.quantile(test.shuffled, study.config.level, method="inverted_cdf")
    return {
        "lowest_entropy": _finite(float(test.lowest)),
        "shuffled_entropy": _finite(shuffled),
        "beyond_chance": int(test.mask.any(axis=0).sum()),
        "beyond_chance_per_domain": {
            name: int(mask.sum()) for name, mask in zip(study.names, test.mask, strict=True)
        },
    }


def _finite(value: float) -> float | None:
    """Return None for an infinite entropy, which JSON cannot represent."""
    return float(value) if np.isfinite(value) else None
