"""How much a selection hangs on its rule and on its sample, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.neurons import selection
from experiments.neurons.base import Study
from experiments.neurons.counts import Counts
from mllm_jax.analysis import domain_neurons, selectors, stability
from mllm_jax.analysis.domain_neurons import SelectedNeurons


def compare(
    this: Study, counts: selection.All, found: Mapping[str, SelectedNeurons]
) -> dict[str, Any]:
    """How far other selectors, and other settings of the rule, take the same neurons."""
    rule = selection.rule(this.config)
    names = tuple(dict.fromkeys((rule["selector"], *this.config.compare)))
    if len(names) < 2:
        return {}
    chosen = {names[0]: found} | {
        name: selection.select(this, counts, rule | {"selector": name}) for name in names[1:]
    }
    shared = {
        module: selectors.overlap({name: chosen[name][module].mask for name in names})
        for module in found
    }
    settings = [
        (field, value)
        for field, values in selection.SETTINGS.items()
        for value in values
        if value != rule[field]
    ]
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
            _setting(field, value, found, selection.select(this, counts, rule | {field: value}))
            for field, value in settings
        ],
    }


def _setting(field: str, value: str, found, other: Mapping[str, SelectedNeurons]) -> dict[str, Any]:
    """Neurons shared with the study's own (Jaccard index, mean over domains), by module."""
    return {
        "field": field,
        "value": value or "default",
        "jaccard": {
            module: float(stability.jaccard(found[module].mask, f.mask).mean())
            for module, f in other.items()
        },
        "selected": {module: int(f.selected.sum()) for module, f in other.items()},
    }


def steadiness(this: Study, counts: selection.All, module: str) -> dict[str, Any]:
    """Whether the entropy finds the same neurons in other examples, and more than chance.

    Groups of examples are split into halves, drawn again, and given to domains at random. A module
    is taken by itself, though thresholds be "global". Nothing where a domain has a single group.
    """
    config, rule = this.config, selection.rule(this.config)
    given = Counts.of(counts, module, rule["scope"])
    data = given.positive, given.tokens, given.domain
    fewest = int(np.bincount(given.domain).min())
    if fewest < 2 or not config.shuffles:
        return {}
    how = selection.options(config, rule)

    def select(positive, tokens):
        found = domain_neurons.select_modules(
            {module: positive}, {module: tokens}, thresholds=rule["thresholds"], **how
        )
        return found[module].mask

    def make():
        sizes = sorted({max(1, fewest // (2 * part)) for part in (1, 2, 4)})
        halves = stability.split_half(*data, sizes=sizes, repeats=config.splits, select=select)
        again = stability.bootstrap(*data, resamples=config.resamples, select=select)
        examples = min(len(this.asked("train", name).pairs) for name in this.names)
        return {
            "examples": [round(size * examples / fewest) for size in sizes],
            "halves": halves.jaccard.mean(axis=1).tolist(),
            "bootstrap": {k: values.tolist() for k, values in again.jaccard._asdict().items()},
            "always": int((again.frequency >= 0.95).any(axis=0).sum()),
            "level": config.level,
        } | chance()

    def chance():
        """What shuffled domains give; nothing where there are too few groups to tell."""
        if stability.power(given.domain, config.shuffles, config.level) < stability.POWER:
            return dict.fromkeys(("lowest", "shuffled", "beyond"))
        test = stability.shuffle_test(*data, shuffles=config.shuffles, level=config.level, **how)
        return {
            "lowest": _finite(test.selection.entropy.min()),
            "shuffled": _finite(np.quantile(test.lowest, config.level, method="inverted_cdf")),
            "beyond": int(test.mask.any(axis=0).sum()),
        }

    return this.workdir.json(f"steadiness-{module}", make)


def _finite(value: float) -> float | None:
    """None for the entropy of nothing."""
    return float(value) if np.isfinite(value) else None
