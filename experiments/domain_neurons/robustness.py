"""Test how much a selection depends on its rule and sample, and whether it exceeds chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.domain_neurons import selection
from experiments.domain_neurons.context import Study
from experiments.domain_neurons.counts import Counts
from mllm_jax.analysis import domain_neurons, selectors
from mllm_jax.analysis import stability as stability_
from mllm_jax.analysis.domain_neurons import SelectedNeurons


def compare(
    study: Study, counted: selection.DomainCounts, neurons: Mapping[str, SelectedNeurons]
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
            module: float(stability_.jaccard(neurons[module].mask, other.mask).mean())
            for module, other in others.items()
        },
        "selected": {module: int(other.selected.sum()) for module, other in others.items()},
    }


def stability(study: Study, counted: selection.DomainCounts, module: str) -> dict[str, Any]:
    """Test whether the entropy selects the same neurons in other examples, and more than chance.

    Groups of examples are split into halves, resampled, and assigned to domains at random. Each
    module is tested on its own, also with "global" thresholds.

    Returns:
        The entry of the module in results.json; {} where a domain has a single group.
    """
    config, rule = study.config, selection.rule(study.config)
    counts = Counts.of(counted, module, rule.scope)
    if np.bincount(counts.domain).min() < 2 or not config.shuffles:
        return {}
    options = selection.options(config, rule)

    def select(positive: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        selected = domain_neurons.select_modules(
            {module: positive}, {module: tokens}, thresholds=rule.thresholds, **options
        )
        return selected[module].mask

    def make() -> dict[str, Any]:
        return _resample(study, counts, select) | _shuffle(study, counts, options)

    return study.workdir.json(f"stability-{module}", make)


def _resample(study: Study, counts: Counts, select: stability_.Select) -> dict[str, Any]:
    """Return the neurons that halves of the groups, and resamples of all groups, share."""
    config, data = study.config, (counts.positive, counts.tokens, counts.domain)
    groups = int(np.bincount(counts.domain).min())
    sizes = sorted({max(1, groups // (2 * part)) for part in (1, 2, 4)})
    halves = stability_.split_half(*data, sizes=sizes, repeats=config.splits, select=select)
    resampled = stability_.bootstrap(*data, resamples=config.resamples, select=select)
    examples = min(len(study.questions("train", name).pairs) for name in study.names)
    return {
        "examples": [round(size * examples / groups) for size in sizes],
        "halves": halves.jaccard.mean(axis=1).tolist(),
        "bootstrap": {key: values.tolist() for key, values in resampled.jaccard._asdict().items()},
        "stable": int((resampled.frequency >= 0.95).any(axis=0).sum()),
        "level": config.level,
    }


def _shuffle(study: Study, counts: Counts, options: dict[str, Any]) -> dict[str, Any]:
    """Return the entropies of shuffled domains; None where there are too few groups to tell."""
    config = study.config
    if stability_.power(counts.domain, config.shuffles, config.level) < stability_.POWER:
        return dict.fromkeys(("lowest_entropy", "shuffled_entropy", "beyond_chance"))
    test = stability_.shuffle_test(
        counts.positive, counts.tokens, counts.domain, shuffles=config.shuffles,
        level=config.level, **options,
    )  # fmt: skip
    shuffled = np.quantile(test.lowest, config.level, method="inverted_cdf")
    return {
        "lowest_entropy": _finite(test.selection.entropy.min()),
        "shuffled_entropy": _finite(shuffled),
        "beyond_chance": int(test.mask.any(axis=0).sum()),
    }


def _finite(value: float) -> float | None:
    """Return None for an infinite entropy, which JSON cannot hold."""
    return float(value) if np.isfinite(value) else None
