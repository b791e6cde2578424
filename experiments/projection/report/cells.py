"""Cells of the tables of the projection study, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mllm_jax.analysis.projection import BEFORE, CLIP, E2E, ORIGINAL, PROJ
from mllm_jax.analysis.scores import MARGIN
from mllm_jax.report import page, style

FIXED = {
    "Random": "#A8A8A8", CLIP: "#CC79A7", BEFORE: "#009E73", ORIGINAL: "#5B5B5B",
    PROJ: "#0072B2", E2E: "#D55E00",
}  # fmt: skip
Row = Mapping[str, Any]  # of a list of results.json
VALUE = ("mean", "deviation", "low", "high")
CHANGE = ("value", "low", "high", "relative", "equivalent")
MARKS = (
    f"* marks changes whose interval excludes zero, ≈ those shown to be within {MARGIN:g} of none "
    "(two one-sided tests)."
)


def group(rows: Iterable[Row], outer: str, inner: str) -> dict[str, dict[str, Row]]:
    """Return rows by two of their fields, the outer one first."""
    grouped: dict[str, dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(row[outer], {})[row[inner]] = row
    return grouped


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """Return a colour for each variant of the rows; those of FIXED come first."""
    named = dict.fromkeys(row["variant"] for row in rows)
    others = [name for name in named if name not in FIXED]
    spare = [colour for colour in style.PALETTE if colour not in FIXED.values()]
    more = dict(zip(others, spare * len(others), strict=False))
    return {name: colour for name, colour in (FIXED | more).items() if name in named}


def value(value: Row) -> str:
    """Return a mean with its deviation as text."""
    deviation = value.get("deviation")
    return f"{value['mean']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def interval(value: Row) -> str:
    """Return the interval of a mean as text."""
    return f"[{value['low']:.2f}, {value['high']:.2f}]"


def relative(change: Row | None) -> str:
    """Return the relative size of a change in brackets, with its mark, see MARKS."""
    if change is None or change["relative"] is None:
        return ""
    return f" ({100 * change['relative']:+.0f} %{_mark(change)})".replace("-", page.MINUS)


def _mark(change: Row) -> str:
    if change["low"] > 0 or change["high"] < 0:
        return "*"
    return "≈" if change["equivalent"] else ""


def one_seed(results: Mapping[str, Any]) -> str:
    """Return the sentence on a study of one seed; empty if there are more."""
    if len(results["seeds"]) > 1:
        return ""
    return (
        f"There is one seed ({results['seeds'][0]}): the intervals are over pictures only, and "
        "do not include the variance between fine-tunings. "
    )


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.0f} %"


def pick(values: Row | None, keys: Sequence[str]) -> list[float | None]:
    """Return the values of some keys; None if there are no values."""
    return [None if values is None else values.get(key) for key in keys]


def change(change: Row | None) -> str:
    """Return a change with its relative size as text; a dash if it was not measured."""
    if change is None:
        return page.DASH
    return page.signed(change["value"]) + relative(change)
