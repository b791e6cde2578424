"""Test the effects of ablations: against no ablation, and against the controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.domain_neurons.controls import Kind
from mllm_jax.analysis import intervals, power

Row = dict[str, Any]
# Of one cell: `score` [N], `tokens` [kinds, N], and the deviation sums [layers, kinds, N].
Arrays = Mapping[str, np.ndarray]
# The verdicts on an effect.
EFFECT, NONE, UNDECIDED = "effect", "none within the margin", "undecided"
DEVIATIONS = ("relative_l2", "cosine")
MEASURES = ("accuracy", *DEVIATIONS)


def change(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Return the mean paired difference, its interval, and the p-value of no difference."""
    found = intervals.paired_difference(before, after)
    return {
        "difference": float(found.value), "low": float(found.low), "high": float(found.high),
        "p": intervals.sign_flip(after - before),
    }  # fmt: skip


def correct_cells(rows: Sequence[Row], questions: Mapping[str, int]) -> list[Row]:
    """Correct the tests of the cells, in place, and return the effects that they could find.

    The cells of domains with their own neurons ablated are a separate family of tests, so that the
    cells with other domains' neurons do not reduce their power.

    Args:
      rows: The cells in which domain neurons are ablated.
      questions: The number of questions by domain.

    Returns:
      A row for each family and domain.
    """
    out = []
    for family in ("own", "other"):
        members = [row for row in rows if (row["mask"] == row["data"]) == (family == "own")]
        for row in members:
            row["family"] = family
        correct(members)
        for name, count in questions.items() if members else ():
            found = power.answers(count, len(members))
            out.append({"family": family, "data": name, "tests": len(members), "n": count,
                        "possible": found.possible, "likely": found.likely})  # fmt: skip
    return out


def correct(rows: Iterable[Row]) -> None:
    """Add `p_holm`, the p-values corrected for the number of rows (Holm); None remains None."""
    tested = [row for row in rows if row["p"] is not None]
    if tested:
        adjusted = intervals.holm(np.array([row["p"] for row in tested]))
        for row, p in zip(tested, adjusted, strict=True):
            row["p_holm"] = float(p)


def against_controls(
    own: Arrays,
    controls: Mapping[Kind, Sequence[Arrays]],
    kinds: Sequence[str],
    changeable: int,
) -> list[Row]:
    """Compare the ablation of a domain's own neurons with that of each kind of control.

    Args:
      own: The arrays of the domain's own neurons.
      controls: The arrays of each draw, by kind of control.
      kinds: The kinds of token of the deviation sums.
      changeable: The number of questions whose score can change, `n` of accuracy.

    Returns:
      A row for each kind of control, measure and kind of token; accuracy has no kind of token.
    """
    out = []
    for control, draws in controls.items():
        for measure, kind in _measures(own, kinds) if draws else ():
            ours = _values(own, measure, kind)
            theirs = np.stack([_values(arrays, measure, kind) for arrays in draws])
            tokens = None if kind is None else kinds[kind]
            count = changeable if kind is None else len(ours)
            out.append(
                {"control": control, "draws": len(draws), "n": count, "measure": measure,
                 "tokens": tokens, "own": float(ours.mean()), "drawn": float(theirs.mean()),
                 **_effect(intervals.effect(ours, theirs))}
            )  # fmt: skip
    return out


def by_layer(
    own: Arrays, controls: Mapping[Kind, Sequence[Arrays]], kinds: Sequence[str]
) -> list[Row]:
    """Compare the deviations of hidden states layer by layer.

    Args:
      own: The arrays of the domain's own neurons.
      controls: The arrays of each draw, by kind of control.
      kinds: The kinds of token of the deviation sums.

    Returns:
      A row for each measure and kind of token with `value`, `low` and `high` of own neurons, and
      one for each kind of control with its `value` and own less control, `difference`, with
      `difference_low` and `difference_high`; each a list with a number for each layer. The
      interval of a difference is None for a single draw, which has no variance.
    """
    out: list[Row] = []
    for measure, kind in _measures(own, kinds):
        if kind is None:
            continue
        ours = _by_layer(own, measure, kind)
        named = {"measure": measure, "tokens": kinds[kind]}
        mean = intervals.mean(ours.T)
        out.append({"control": None, **named, **_lists(mean._asdict())})
        for control, draws in controls.items():
            if draws:
                theirs = np.stack([_by_layer(arrays, measure, kind) for arrays in draws])
                found = intervals.difference(ours, theirs)
                ends = {"difference": found.value, "difference_low": found.low,
                        "difference_high": found.high}  # fmt: skip
                value = {"value": theirs.mean(axis=(0, -1))}
                out.append({"control": control, **named, **_lists(value | ends)})
    return out


def _lists(arrays: Mapping[str, np.ndarray]) -> Row:
    """Return arrays as lists, or None for an array that is not finite, for JSON."""
    return {
        name: values.tolist() if np.isfinite(values).all() else None
        for name, values in arrays.items()
    }


def correct_effects(rows: Sequence[Row], margin: float) -> None:
    """Correct the effects in place, and add their verdicts and the effects that could be found.

    A family contains all modules and domains of one kind of control, measure and kind of token.
    `possible` and `likely` follow from the observed variance, but are at least the smallest effects
    detectable with that many questions; they are None for a single draw, which has no variance.

    Args:
      rows: The effects.
      margin: The margin of the test of equivalence: a share of the answers, or a deviation.
    """
    families: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in rows:
        families.setdefault((row["control"], row["measure"], row["tokens"]), []).append(row)
    for family in families.values():
        for row in family:
            row["p_holm"] = row["possible"] = row["likely"] = row["p_equal"] = None
            row["margin"] = margin
            error, degrees = row.pop("error"), row.pop("degrees")
            if error is None:
                continue
            effect = intervals.Effect(
                row["difference"], row["low"], row["high"], row["p"], error, degrees
            )
            answers = row["n"] if row["measure"] == "accuracy" else None
            row["p_equal"] = intervals.equivalence(effect, margin, answers=answers)
            found = power.difference(error, degrees, len(family))
            if row["measure"] == "accuracy":
                found = _at_least(power.answers(row["n"], len(family)), found)
            row["possible"], row["likely"] = found
        correct(family)
        for row in family:
            row["verdict"] = _verdict(row)


def _verdict(row: Row) -> str | None:
    """Return the verdict of both tests of an effect; None for a single draw.

    Tests of equivalence are not corrected: each verdict is about its own effect only.
    """
    if row["p_equal"] is None:
        return None
    if row["p_holm"] <= power.LEVEL:
        return EFFECT
    return NONE if row["p_equal"] <= power.LEVEL else UNDECIDED


def _measures(own: Arrays, kinds: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return the measures of a cell, each with the index of the kind of token."""
    counted = [k for k in range(len(kinds)) if own["tokens"][k].any()]
    return [("accuracy", None), *((m, k) for m in DEVIATIONS for k in counted)]


def _values(arrays: Arrays, measure: str, kind: int | None) -> np.ndarray:
    """Return a value for each question, whose mean is the score or the deviation per token."""
    if kind is None:
        return arrays["score"]
    return _by_layer(arrays, measure, kind)[-1]


def _by_layer(arrays: Arrays, measure: str, kind: int) -> np.ndarray:
    """Return [layers, N], a value for each question whose mean is the deviation per token."""
    return arrays[measure][:, kind] / arrays["tokens"][kind].mean()


def _effect(effect: intervals.Effect) -> Row:
    names = ("difference", "low", "high", "p", "error", "degrees")
    return {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(names, effect, strict=True)
    }


def _at_least(bound: power.Detectable, found: power.Detectable) -> power.Detectable:
    """Return the larger of both; None if the bound is None."""
    if bound.possible is None or bound.likely is None:
        return bound
    assert found.possible is not None and found.likely is not None  # a t test finds some effect
    return power.Detectable(max(bound.possible, found.possible), max(bound.likely, found.likely))
