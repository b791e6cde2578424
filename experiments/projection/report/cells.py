"""Cells of the tables of the projection study, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mllm_jax.analysis.projection import BEFORE, CLIP, E2E, ORIGINAL, PROJ
from mllm_jax.report import page, style

FIXED = {
    "Random": "#A8A8A8", CLIP: "#CC79A7", BEFORE: "#009E73", ORIGINAL: "#5B5B5B",
    PROJ: "#0072B2", E2E: "#D55E00",
}  # fmt: skip
Row = Mapping[str, Any]  # of a list of results.json
VALUE = ("mean", "deviation", "low", "high")
CHANGE = ("value", "low", "high", "relative")


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


def relative(change: Row | None) -> str:
    """Return the relative size of a change in brackets; * where its interval excludes zero."""
    if change is None or change["relative"] is None:
        return ""
    star = "*" if change["low"] > 0 or change["high"] < 0 else ""
    return f" ({100 * change['relative']:+.0f} %{star})".replace("-", page.MINUS)


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.0f} %"


def pick(values: Row | None, keys: Sequence[str]) -> list[float | None]:
    """Return the values of some keys, None where there are no values."""
    return [None if values is None else values.get(key) for key in keys]


def change(change: Row | None) -> str:
    """Return a change with its relative size as text; a dash where it was not measured."""
    if change is None:
        return page.DASH
    return page.signed(change["value"]) + relative(change)
