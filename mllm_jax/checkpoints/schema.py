"""Check the fields of a `config.json` by tables: name -> (kind of value, default).

The limits are far above those of existing models. They keep a hostile file from requesting a huge
number of layers or words before its tensors are compared with the config.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mllm_jax import files


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
      expected: A description for error messages.
      accepts: Returns whether a JSON value is of this kind.
    """

    expected: str
    accepts: Callable[[Any], bool]


Table = Mapping[str, tuple[Kind, Any]]


class Unknown(str):
    """An unknown field: a problem with a config whose tensors are nevertheless known."""


def whole(low: int, high: int) -> Kind:
    """Return the kind of integers in a range, without booleans."""
    return Kind(
        f"one integer from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def real(low: float, high: float) -> Kind:
    """Return the kind of finite numbers in a range."""
    return Kind(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,
    )


def only(*values: Any) -> Kind:
    """Return the kind of these values; types must match, so that `true` is not 1."""
    return Kind(
        ", ".join(map(repr, values)),
        lambda value: any(type(value) is type(one) and value == one for one in values),
    )


def optional(kind: Kind) -> Kind:
    """Return the kind that also accepts null."""
    return Kind(f"{kind.expected} or null", lambda value: value is None or kind.accepts(value))


def many(kind: Kind, least: int, most: int) -> Kind:
    """Return the kind of lists of `least` to `most` values of one kind."""
    return Kind(
        f"a list of {least} to {most} of {kind.expected}" if least < most
        else f"{least} of {kind.expected}",
        lambda value: isinstance(value, (list, tuple)) and least <= len(value) <= most
        and all(map(kind.accepts, value)),
    )  # fmt: skip


def either(*kinds: Kind) -> Kind:
    """Return the union of several kinds."""
    return Kind(
        " or ".join(kind.expected for kind in kinds),
        lambda value: any(kind.accepts(value) for kind in kinds),
    )


FLAG = only(False, True)
PART = optional(Kind("an object", lambda value: isinstance(value, Mapping)))
NAME = Kind("a name", lambda value: isinstance(value, str) and 0 < len(value) <= 1000)
LAYERS = whole(1, 1024)
WIDTH = whole(1, 2**20)  # of a layer, in neurons or channels
HEADS = whole(1, 2**12)
WORDS = whole(1, 2**24)  # of a vocabulary
PLACES = whole(1, 2**31 - 1)  # of a text
SIDE = whole(1, 4096)  # of a picture or patch, in pixels
EPSILON = real(1e-30, 1)
ID = whole(0, 2**31 - 1)  # of a token
IDS = optional(either(ID, many(ID, 0, 1000)))


def read(
    fields: Mapping[str, Any],
    table: Table,
    ignored: Collection[str],
    prefix: str,
    problems: list[str],
) -> dict[str, Any]:
    """Return the fields of a table, and append an entry for each wrong field to `problems`.

    Args:
      fields: The fields of a config, or of a part of one.
      table: The fields that are read.
      ignored: The names of fields that have no effect. Any further field is a problem.
      prefix: The prefix of field names in error messages.
      problems: A list to which problems are appended, one line each.

    Returns:
      The values by name. Missing and wrong fields get their default, so that every value is of the
      expected kind.
    """
    kind = table.get("model_type")
    if kind and not kind[0].accepts(fields.get("model_type", kind[1])):
        fields = {
            "model_type": fields["model_type"]
        }  # otherwise every field of another model would be unknown
    if (how := fields.get("quantization_config")) is not None:
        method = how.get("quant_method", "unnamed") if isinstance(how, Mapping) else how
        problems.append(
            f"{prefix}quantization_config: weights quantised by {files.shown(method, 30)} are not "
            "read; use the original checkpoint, or save this one again after dequantize()"
        )
    for name in fields:
        if name not in table and name not in ignored and name != "quantization_config":
            near = difflib.get_close_matches(name[:100], table, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            problems.append(Unknown(f"unknown field {prefix}{files.line(name, 60)}{hint}"))
    return values(fields, table, prefix, problems)


def values(
    fields: Mapping[str, Any], table: Table, prefix: str, problems: list[str]
) -> dict[str, Any]:
    """Return the fields of a table like `read`, but ignore all other fields."""
    known = {}
    for name, (kind, default) in table.items():
        value = fields.get(name, default)
        if name in fields and not kind.accepts(value):
            shown = f"{prefix}{name}={files.shown(value)}"
            problems.append(f"{shown} is not supported, only {kind.expected}")
            value = default
        known[name] = value
    return known


def divides(part: tuple[str, int], whole: tuple[str, int], problems: list[str]) -> None:
    """Append a problem if `whole` is not a multiple of `part`; both are (name, number)."""
    if whole[1] % part[1]:
        problems.append(f"{whole[0]}={whole[1]} is not a multiple of {part[0]}={part[1]}")
