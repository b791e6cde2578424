"""Measures of a circuit: exact patches, and curves on held-out pairs beside random circuits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.stats

from experiments.circuit import graph
from experiments.circuit.context import Arrays, Study
from mllm_jax.analysis import attribution, circuits, intervals
from mllm_jax.typing import Bool, Float

Rows = list[dict[str, Any]]


def node_rows(
    study: Study,
    mask: Bool[np.ndarray, "kinds L nodes"],
    scores: Float[np.ndarray, "kinds L nodes"],
) -> Rows:
    """Return the nodes of a mask with their scores, largest first."""
    places = [place for place in attribution.top(scores, scores.size) if mask[tuple(place)]]
    return [_named(study, place) | {"score": float(scores[tuple(place)])} for place in places]


def _named(study: Study, place: np.ndarray) -> dict[str, Any]:
    kind, layer, unit = place.tolist()
    part = graph.part_name(unit, study.model.config.lm.heads)
    return {"kind": study.config.kinds[kind], "layer": layer, "part": part}


def tested_nodes(
    scores: Float[np.ndarray, "kinds L nodes"], count: int, seed: int
) -> Bool[np.ndarray, "kinds L nodes"]:
    """Return nodes for exact patches: half with the largest absolute scores, the rest at random."""
    mask = attribution.top_mask(np.abs(scores), -(-count // 2))
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(~mask))[: count // 2]
    mask.reshape(-1)[drawn] = True
    return mask


def exact(
    study: Study, scores: Float[np.ndarray, "kinds L nodes"],
    estimates: Float[np.ndarray, "kinds L nodes"],
) -> dict[str, Any]:  # fmt: skip
    """Compare estimates with exact patches, over the first training pairs.

    Args:
      study: The study.
      scores: The scores of all training pairs, by which nodes are chosen.
      estimates: The scores over only the first pairs.
    """
    mask = tested_nodes(scores, study.config.exact_nodes, study.config.seed)
    if not mask.any() or not study.config.exact_pairs:
        return {"pairs": 0, "nodes": [], "correlation": None}

    def make(number: int) -> Arrays:
        contrast = study.contrast("train", number)
        lanes = circuits.without_each(np.ones_like(mask), mask)
        metric = circuits.evaluate(contrast, lanes, kinds=tuple(study.config.kinds))
        falls = contrast.metric_of(contrast.clean) - metric
        return {"falls": falls[:, study.real("train", number)]}

    found = study.each("exact", "train", make, study.config.exact_pairs)
    falls = np.concatenate([arrays["falls"] for arrays in found], 1)
    estimate, patched = estimates[mask], falls.mean(1)
    rows = [
        _named(study, place) | {"estimate": float(a), "exact": float(b)}
        for place, a, b in zip(np.argwhere(mask), estimate, patched, strict=True)
    ]
    correlation = {
        name: _interval(pearson(*values))
        for name, values in {
            "pearson": (estimate, patched),
            "spearman": (scipy.stats.rankdata(estimate), scipy.stats.rankdata(patched)),
        }.items()
    }
    return {"pairs": falls.shape[1], "nodes": rows, "correlation": correlation}


def pearson(
    first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]
) -> intervals.Interval[float]:
    """Return the correlation of two measures of n nodes, with its interval over the nodes.

    If one of them does not vary, the correlation is 0.
    """
    count = len(first)
    weights = np.concatenate([np.ones((1, count)), intervals.draws(count)])

    def moment(values: np.ndarray) -> np.ndarray:
        return np.einsum("rn,n->r", weights, values) / count

    x, y = (np.asarray(values, np.float64) - np.mean(values) for values in (first, second))
    covariance = moment(x * y) - moment(x) * moment(y)
    spread = (moment(x * x) - moment(x) ** 2) * (moment(y * y) - moment(y) ** 2)
    varies = spread > 1e-24
    value = np.where(varies, covariance / np.sqrt(np.where(varies, spread, 1)), 0)
    low, high = intervals.percentiles(value[1:])
    return intervals.Interval(float(value[0]), float(low), float(high))


def held_out(
    study: Study, scores: Float[np.ndarray, "kinds L nodes"],
    circuit: Bool[np.ndarray, "kinds L nodes"],
) -> dict[str, Any]:  # fmt: skip
    """Measure circuits of growing size, and each node of the shown one, on test pairs.

    Args:
      study: The study.
      scores: The scores of all nodes; the largest make a circuit.
      circuit: The circuit that is shown.

    Returns:
      The entries "difference", "curves" and "minimality" of results.json.
    """
    config, kinds = study.config, tuple(study.config.kinds)
    random = np.random.default_rng(config.seed).random(scores.shape)
    shown = {"found": circuit, "random0": attribution.top_mask(random, int(circuit.sum()))}
    lanes = np.concatenate(
        [np.concatenate([mask[None], circuits.without_each(mask, mask)]) for mask in shown.values()]
    )

    def curves(number: int) -> Arrays:
        found = circuits.curves(
            study.contrast("test", number), scores, tuple(config.sizes), kinds=kinds,
            draws=config.draws, seed=config.seed,
        )  # fmt: skip
        real = study.real("test", number)
        names = ("circuit", "complement", "random_circuit", "random_complement", "clean", "corrupt")
        return {name: getattr(found, name)[..., real] for name in names}

    def reduced(number: int) -> Arrays:
        metric = circuits.evaluate(study.contrast("test", number), lanes, kinds=kinds)
        return {"metric": metric[:, study.real("test", number)]}

    found = study.each("curves", "test", curves)
    ends = {name: np.concatenate([a[name] for a in found], -1) for name in found[0]}
    metric = np.concatenate([a["metric"] for a in study.each("minimality", "test", reduced)], -1)
    minimality: Rows = []
    for (name, mask), (whole, *without) in zip(
        shown.items(), np.split(metric, len(shown)), strict=True
    ):
        fall = share(whole - np.array(without), ends)
        minimality += [
            {"circuit": name, **_named(study, place), **values}
            for place, values in zip(np.argwhere(mask), fall, strict=True)
        ]
    return {
        "difference": {
            name: _interval(intervals.mean(ends[name])) for name in ("clean", "corrupt")
        },
        "curves": _curve_rows(tuple(config.sizes), ends),
        "minimality": minimality,
    }


def share(metric: Float[np.ndarray, "n B"], ends: Arrays) -> list[dict[str, float]]:
    """Return parts of the difference of clean and corrupt metric, with intervals over pairs."""
    weights = (ends["clean"] - ends["corrupt"])[:, None]
    found = intervals.ratio(metric.T, weights)
    return [_interval(point) for point in zip(*found, strict=True)]


def _curve_rows(sizes: tuple[int, ...], ends: Arrays) -> Rows:
    """Return faithfulness and incompleteness of each circuit, found and random."""
    metrics = {"found": (ends["circuit"], ends["complement"])} | {
        f"random{draw}": pair
        for draw, pair in enumerate(
            zip(ends["random_circuit"], ends["random_complement"], strict=True)
        )
    }
    rows: Rows = []
    for name, (circuit, complement) in metrics.items():
        kept, left = (share(metric - ends["corrupt"], ends) for metric in (circuit, complement))
        for size, inside, outside in zip(sizes, kept, left, strict=True):
            columns = {"faithfulness": inside, "left": outside}
            rows.append({"circuit": name, "nodes": size, **_columns(columns)})
    return rows


def _columns(values: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return values with their intervals as columns: NAME, NAME_low, NAME_high."""
    return {
        name if key == "value" else f"{name}_{key}": number
        for name, value in values.items()
        for key, number in value.items()
    }


def _interval(parts: Iterable[Any]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), map(float, parts), strict=True))
