"""Draw control neurons: with similar activation rates, at random, or with high entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.domain_neurons import selection
from experiments.domain_neurons.context import Study
from mllm_jax.analysis import controls, domain_neurons, stability
from mllm_jax.analysis.domain_neurons import SelectedNeurons

Kind = Literal["rate", "layer", "entropy"]
KINDS: tuple[Kind, ...] = ("rate", "layer", "entropy")


class Activity(NamedTuple):
    """How active the neurons of a module are on the counted tokens of each domain.

    Attributes:
      rate: float64[D_, L, F], the share of tokens on which a neuron is active.
      mean: float64[D_, L, F], its mean activation.
    """

    rate: np.ndarray
    mean: np.ndarray


class Controls(NamedTuple):
    """The controls of the neurons of all modules.

    Attributes:
      draws: The number of draws of each kind.
      masks: bool[R, D_, L, F] by module and kind.
      rows: How well the activation rates match, a row for each module, domain and kind.
    """

    draws: dict[Kind, int]
    masks: dict[tuple[str, Kind], np.ndarray]
    rows: list[dict[str, Any]]


def activities(study: Study, counted: selection.Counted) -> dict[str, Activity]:
    """Return how active the neurons of each module are on the tokens of the counted scope."""
    out = {}
    for module in study.shapes:
        counts = selection.counts_of(study, counted, module)
        positive, tokens = stability.pool(counts.positive, counts.tokens, counts.domain)
        total = np.stack([counts.sum[counts.domain == d].sum(0) for d in range(len(tokens))])
        out[module] = Activity(*(values / tokens[:, None, None] for values in (positive, total)))
    return out


def draw(
    study: Study, neurons: Mapping[str, SelectedNeurons], active: Mapping[str, Activity]
) -> Controls:
    """Draw the controls of every module.

    Args:
      study: The study; `controls`, `random_controls` and `entropy_controls` of its config are the
        numbers of draws.
      neurons: The neurons by module.
      active: The activity of the neurons; if empty, any neurons of the layers are drawn.
    """
    config = study.config
    draws: dict[Kind, int] = {
        "rate": config.controls if active else 0, "layer": config.random_controls,
        "entropy": config.entropy_controls if active else 0,
    }  # fmt: skip
    masks, rows = {}, []
    for module, selected in neurons.items():
        for kind in (kind for kind in KINDS if draws[kind]):
            if kind == "rate":
                drawn = controls.rate_matched(
                    selected.mask, *active[module], draws=draws[kind], key=config.seed
                ).mask
            elif kind == "entropy":
                drawn = controls.high_entropy(
                    selected.mask, domain_neurons.entropy(active[module].rate), draws=draws[kind],
                    key=config.seed,
                )  # fmt: skip
            else:
                drawn = np.stack(
                    [domain_neurons.random_like(selected, seed) for seed in range(draws[kind])]
                )
            masks[module, kind] = drawn
            if active:
                rows += _rows(study, module, kind, selected.mask, active[module], drawn)
    return Controls(draws, masks, rows)


def _rows(
    study: Study,
    module: str,
    kind: Kind,
    mask: np.ndarray,
    active: Activity,
    drawn: np.ndarray,
) -> list[dict[str, Any]]:
    """Return how well the draws of a module match, a row for each domain that has neurons."""
    compared = controls.compare(mask, active.rate, drawn)
    unmatched = compared.unmatched()
    return [
        {
            "module": module,
            "data": name,
            "control": kind,
            "draws": len(drawn),
            "neurons": int(mask[d].sum()),
            "rate": float(active.rate[d][mask[d]].mean()),
            "drawn_rate": _mean(drawn[:, d], active.rate[d]),
            "mean": float(active.mean[d][mask[d]].mean()),
            "drawn_mean": _mean(drawn[:, d], active.mean[d]),
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


def _mean(drawn: np.ndarray, values: np.ndarray) -> float | None:
    """Return the mean of values [L, F] over the neurons of all draws [R, L, F]; None for none."""
    values = np.broadcast_to(values, drawn.shape)[drawn]
    return float(values.mean()) if values.size else None


def _json(value: float) -> float | None:
    """Return None for a difference without neurons, NaN, which JSON cannot represent."""
    return None if np.isnan(value) else float(value)
