"""Draw the neurons that are ablated as controls: of like rates, of any, or of no domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.domain_neurons import selection
from experiments.domain_neurons.context import Study
from experiments.domain_neurons.counts import Counts
from mllm_jax.analysis import controls, domain_neurons, stability
from mllm_jax.analysis.domain_neurons import SelectedNeurons

Kind = Literal["rate", "layer", "entropy"]
KINDS: tuple[Kind, ...] = ("rate", "layer", "entropy")
Rates = Mapping[str, np.ndarray]  # float64[D_, L, F] by module


class Controls(NamedTuple):
    """The controls of the neurons of all modules.

    Attributes:
        draws: the number of draws of each kind.
        masks: bool[R, D_, L, F] by module and kind.
        rows: how well the activation rates match, a row for each module, domain and kind.
    """

    draws: dict[Kind, int]
    masks: dict[tuple[str, Kind], np.ndarray]
    rows: list[dict[str, Any]]


def rates(study: Study, counted: selection.DomainCounts) -> dict[str, np.ndarray]:
    """Return the share of a domain's tokens, of the counted scope, on which neurons are active."""
    scope = selection.rule(study.config).scope
    out = {}
    for module in study.shapes:
        counts = Counts.of(counted, module, scope)
        positive, tokens = stability.pool(counts.positive, counts.tokens, counts.domain)
        out[module] = positive / tokens[:, None, None]
    return out


def draw(study: Study, neurons: Mapping[str, SelectedNeurons], rates: Rates) -> Controls:
    """Draw the controls of every module.

    Args:
        study: the study, of whose config `controls`, `random_controls` and `entropy_controls` are
            the draws.
        neurons: the neurons by module.
        rates: the activation rates; without them all neurons are drawn from their layers alone.
    """
    config = study.config
    draws: dict[Kind, int] = {
        "rate": config.controls if rates else 0, "layer": config.random_controls,
        "entropy": config.entropy_controls if rates else 0,
    }  # fmt: skip
    masks, rows = {}, []
    for module, selected in neurons.items():
        for kind in (kind for kind in KINDS if draws[kind]):
            if kind == "rate":
                drawn = controls.rate_matched(
                    selected.mask, rates[module], draws=draws[kind], key=config.seed
                ).mask
            elif kind == "entropy":
                drawn = controls.high_entropy(
                    selected.mask, domain_neurons.entropy(rates[module]), draws=draws[kind],
                    key=config.seed,
                )  # fmt: skip
            else:
                drawn = np.stack(
                    [domain_neurons.random_like(selected, seed) for seed in range(draws[kind])]
                )
            masks[module, kind] = drawn
            if rates:
                compared = controls.compare(selected.mask, rates[module], drawn)
                rows += _rows(study, module, kind, selected.mask, rates[module], compared)
    return Controls(draws, masks, rows)


def _rows(
    study: Study,
    module: str,
    kind: Kind,
    mask: np.ndarray,
    rate: np.ndarray,
    compared: controls.Control,
) -> list[dict[str, Any]]:
    """Return how well the rates of a module match, a row for each domain that has neurons."""
    unmatched = compared.unmatched()
    return [
        {
            "module": module,
            "data": name,
            "control": kind,
            "draws": len(compared.mask),
            "neurons": int(mask[d].sum()),
            "rate": float(rate[d][mask[d]].mean()),
            "drawn_rate": _mean_rate(compared.mask[:, d], rate[d]),
            "layers": int(mask[d].any(axis=-1).sum()),
            "unmatched": [
                {
                    "layer": layer,
                    "difference": _json(compared.difference[d, layer]),
                    "missing": int(compared.missing[d, layer]),
                }
                for domain, layer in unmatched
                if domain == d
            ],
        }
        for d, name in enumerate(study.names)
        if mask[d].any()
    ]


def _mean_rate(drawn: np.ndarray, rate: np.ndarray) -> float | None:
    """Return the mean rate of the neurons of all draws [R, L, F]; None for no neuron."""
    values = np.broadcast_to(rate, drawn.shape)[drawn]
    return float(values.mean()) if values.size else None


def _json(value: float) -> float | None:
    """Return None for a difference from no neuron, which JSON cannot hold."""
    return None if np.isnan(value) else float(value)
