"""The numbers of results.json, each under a name that runs of one study share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# The number that the `low` and `high` beside it belong to: the first of these names.
CENTRES = ("value", "mean", "difference", "change", "effect", "accuracy")
# Fields of rows that name what the row is about, beside those that are text.
KEYS = ("draw", "layer", "seed", "ablated")
OUTSIDE = ("format", "study")
# What illustrates results, at any depth: single neurons, questions, answers and pictures.
ILLUSTRATIONS = ("evidence", "questions", "changed", "by_layer")


class Number(NamedTuple):
    """A number of a run.

    Attributes:
      value: The number.
      low: The lower end of its interval; None if it has none.
      high: The upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


def numbers(results: Mapping[str, Any]) -> dict[str, Number]:
    """Return the numbers of results.json by their names, such as "baseline / medical"."""
    found: dict[str, Number] = {}
    inside = {name: value for name, value in results.items() if name not in OUTSIDE}
    for name, number in _walk(inside, ()):
        found[" / ".join(name)] = number
    return found


def _walk(value: Any, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Number]]:
    if _is_number(value):
        yield name, Number(float(value))
    elif isinstance(value, Mapping):
        yield from _walk_fields(value, name)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for key, item in zip(item_names(value), value, strict=True):
            yield from _walk(item, (*name, key))


def _walk_fields(
    value: Mapping[str, Any], name: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Number]]:
    rest = dict(value)
    centre = next((key for key in CENTRES if _is_measured(value, key)), None)
    if centre is not None:
        middle, low, high = (rest.pop(key) for key in (centre, "low", "high"))
        own = name if centre in ("value", "mean") else (*name, centre)
        for place, ends in _zipped(middle, low, high):
            yield (*own, *place), Number(*map(float, ends))
    for key, item in rest.items():
        names_row = key in KEYS and bool(name) and name[-1].startswith("[")
        if not names_row and key not in ILLUSTRATIONS:
            yield from _walk(item, (*name, str(key)))


def _zipped(middle: Any, low: Any, high: Any) -> Iterator[tuple[tuple[str, ...], Sequence[Any]]]:
    """Yield the numbers of lists of one shape, with their indices."""
    if isinstance(middle, list):
        for i, parts in enumerate(zip(middle, low, high, strict=True)):
            for place, ends in _zipped(*parts):
                yield (str(i), *place), ends
    elif all(map(_is_number, (middle, low, high))):
        yield (), (middle, low, high)
    elif _is_number(middle):
        yield (), (middle,)


def item_names(items: Sequence[Any]) -> list[str]:
    """Return a name for each item of a list: the subject of a row, or its index."""
    if not items or not all(isinstance(item, Mapping) for item in items):
        return [str(i) for i in range(len(items))]
    names = [
        "["
        + ", ".join(
            str(value)
            for key, value in item.items()
            if isinstance(value, str) or (key in KEYS and isinstance(value, int))
        )
        + "]"
        for item in items
    ]
    if len(set(names)) < len(names):
        names = [f"{name[:-1]}, row {i}]" for i, name in enumerate(names)]
    return names


def _is_measured(value: Mapping[str, Any], centre: str) -> bool:
    """Return whether a number, or lists of numbers, and both ends of its interval are there."""
    if not all(key in value for key in (centre, "low", "high")):
        return False
    return _shape(value[centre]) == _shape(value["low"]) == _shape(value["high"]) is not None


def _shape(value: Any) -> tuple[int, ...] | None:
    if _is_number(value) or value is None:
        return ()
    if not isinstance(value, list):
        return None
    shapes = [_shape(item) for item in value]
    if None in shapes or any(a != b for a, b in itertools.pairwise(shapes)):
        return None
    return (len(value), *(shapes[0] or ())) if shapes else (0,)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
