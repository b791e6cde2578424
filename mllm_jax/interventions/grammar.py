"""Parse the text of edits and captures into plain Python values; `spec` describes the syntax.

This module imports neither JAX nor NumPy, so that a command line is checked before they are
loaded. It checks the text itself; checks that need an array, a model or a batch follow later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from mllm_jax import sites, token_names
from mllm_jax.interventions import site_rules

_PAIRS = r"\(-?\d+,-?\d+\)(\+\(-?\d+,-?\d+\))*\+?"
_TARGET = re.compile(r"(?P<site>[a-z_.]+)(\[(?P<at>[^\]]*)\])?$")


@dataclasses.dataclass(frozen=True)
class Words:
    """The parameters that may follow the name of a kind of edit or a form of capture.

    Attributes:
      value: The parameter that takes the value after the site; None if there is none.
      options: The parameters that are written as `name=value`.
      required: The options that must be given.
    """

    value: str | None = None
    options: tuple[str, ...] = ("where", "steps")
    required: tuple[str, ...] = ()


# The kinds of `edits.KINDS` and the forms of `forms.FORMS` that text can express.
EDITS: dict[str, Words] = {
    "ablate": Words(),
    "scale": Words("by"),
    "add": Words("value"),
    "replace": Words("value"),
    "project_out": Words("basis"),
    "patch": Words(
        options=("source", "into", "basis", "where", "steps"), required=("source", "into")
    ),
    "knockout": Words(options=("to", "on")),
}
CAPTURES: dict[str, Words] = {
    "keep": Words(options=("k", "where")),
    "mean": Words(options=("where",)),
    "mass": Words(options=("on", "by", "where", "heads")),
    "attention": Words(options=("where", "heads")),
    "attention_map": Words(options=("to", "on", "heads")),
    "rollout": Words(options=("to", "on")),
    "stats": Words(options=("by", "where")),
    "lens": Words(options=("k", "by", "where")),
    "distribution": Words(options=("by", "where")),
    "top": Words(options=("k", "where")),
    "bottom": Words(options=("k", "where")),
    "sample": Words(options=("k", "edges", "where")),
    "histogram": Words(options=("edges", "by", "where")),
}


@dataclasses.dataclass(frozen=True)
class File:
    """An array in a file, times a factor."""

    path: pathlib.Path
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A selector: a `name`, or "row", "column", "tile", "not", "and", "or" of the parts."""

    name: str
    parts: tuple[Any, ...] = ()


Index: TypeAlias = int | slice | list[int] | File
Pairs: TypeAlias = list[tuple[int, int]]
Value: TypeAlias = float | list[float] | File
Option: TypeAlias = Index | Value | Tokens | File | str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One parsed edit or capture.

    Attributes:
      kind: A key of `EDITS` or `CAPTURES`.
      site: The site.
      at: The content of the brackets: layers and units, or pairs as the only part; None without
        brackets.
      value: The value after the site.
      options: The values of the options, by name.
      place: The position of the text, for error messages.
    """

    kind: str
    site: sites.Site
    at: tuple[Index, ...] | Pairs | None
    value: Value | None
    options: dict[str, Option]
    place: str


def parse(text: str, root: str | pathlib.Path = ".") -> list[Item]:
    """Parse edits, chained by `>>`.

    Args:
      text: The edits.
      root: The folder that `@files` are relative to.

    Raises:
      ValueError: A part is invalid; the message states which, and what is expected.
    """
    items = []
    for number, part in enumerate(map(str.strip, text.split(">>")), 1):
        with located(place := f"edit {number}, '{part}'"):
            items.append(item := _item(part, place, "an edit", EDITS, pathlib.Path(root)))
            site_rules.check_edit(item.kind, item.site)
    return items


def parse_captures(text: str, root: str | pathlib.Path = ".") -> dict[str, Item]:
    """Parse captures, separated by `;`, by name; arguments and errors as in `parse`."""
    captures: dict[str, Item] = {}
    for part in map(str.strip, text.split(";")):
        with located(place := f"capture '{part}'"):
            name, _, rest = (piece.strip() for piece in part.partition("="))
            if not name.isidentifier():
                raise ValueError(
                    f"a capture begins with its name: fire=stats lm.mlp.act, not '{name}'"
                )
            if name in captures:
                raise ValueError(f"there is already a capture '{name}'")
            item = _item(rest, place, "a capture", CAPTURES, pathlib.Path(root))
            units = (item.at or ())[int(item.site.stacked) :]
            all_units = not isinstance(item.at, list) and all(u == slice(None) for u in units)
            site_rules.check_capture(item.kind, item.site, all_units)
            captures[name] = item
    return captures


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """Turn errors inside into a ValueError that begins with the place in the text."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(f"{place}: {reason}") from error


def _item(text: str, place: str, what: str, known: Mapping[str, Words], root: pathlib.Path) -> Item:
    kind, *words = text.split() or [""]
    if kind not in known:
        raise ValueError(f"{what} begins with one of {', '.join(known)}")
    target, *rest = words or [""]
    values = [word for word in rest if "=" not in word]
    options = _options(kind, known[kind], [word for word in rest if "=" in word], root)
    if known[kind].value is None and values:
        raise ValueError(f"{kind} takes no value, got {' '.join(values)}")
    site, at = _target(target, root)
    if known[kind].value is not None and len(values) != 1:
        raise ValueError(f"{kind} takes one value, such as 2.0 or @file.npy*0.5")
    value = _value(values[0], root) if values else None
    return Item(kind, site, at, value, options, place)


def _options(kind: str, allowed: Words, words: list[str], root: pathlib.Path) -> dict[str, Option]:
    options: dict[str, Option] = {}
    for name, _, text in (word.partition("=") for word in words):
        if name not in allowed.options:
            known = ", ".join(allowed.options)
            raise ValueError(f"{kind} has no option '{name}'; it has: {known}")
        if name in options:
            raise ValueError(f"the option '{name}' is given twice")
        options[name] = _READERS[name](text, root)
    if missing := [name for name in allowed.required if name not in options]:
        raise ValueError(f"{kind} needs the option {' and '.join(f'{n}=' for n in missing)}")
    return options


def _target(text: str, root: pathlib.Path) -> tuple[sites.Site, tuple[Index, ...] | Pairs | None]:
    match = _TARGET.match(text)
    if not match:
        raise ValueError(f"'{text}' is not a site with an address, such as lm.mlp.act[12,0:8]")
    name = match["site"]
    site = sites.get(f"{name}.mask" if f"{name}.mask" in sites.BY_NAME else name)
    if match["at"] is None:
        return site, None
    if re.fullmatch(_PAIRS, match["at"]):
        if not site.stacked:
            raise IndexError(f"{site} exists once, not per layer: index it without pairs")
        numbers = [int(number) for number in re.findall(r"-?\d+", match["at"])]
        return site, list(zip(numbers[::2], numbers[1::2], strict=True))
    parts = tuple(_index(part.strip(), root) for part in match["at"].split(","))
    site.check_parts(len(parts))
    return site, parts


def _index(text: str, root: pathlib.Path) -> Index:
    if text.startswith("@"):
        return _file(text[1:], root)
    if text in ("", ":"):
        return slice(None)
    if ":" in text:
        numbers = [int(part) if part else None for part in text.split(":")]
        if len(numbers) > 3 or (numbers[2:] and numbers[2] is not None and numbers[2] < 1):
            raise ValueError(f"'{text}' is not a slice start:stop:step with a positive step")
        return slice(*numbers)
    if "+" in text:
        return [int(part) for part in text.split("+") if part]
    return int(text)


def _value(text: str, root: pathlib.Path) -> Value:
    if not text.startswith("@"):
        numbers = [float(part) for part in text.split(",")]
        return numbers if "," in text else numbers[0]
    file, _, factor = text[1:].partition("*")
    return dataclasses.replace(_file(file, root), factor=float(factor or 1))


def _file(name: str, root: pathlib.Path) -> File:
    path = root / name
    if path.suffix not in (".npy", ".json"):
        raise ValueError(f"'{name}' is neither .npy nor .json")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return File(path)


def parse_where(text: str, root: pathlib.Path) -> Tokens | File:
    """Parse a selector of tokens; arguments and errors as in `parse`."""
    for sign, join in (("|", "or"), ("&", "and")):
        if sign in text:
            return Tokens(join, tuple(parse_where(part, root) for part in text.split(sign)))
    if text.startswith("~"):
        return Tokens("not", (parse_where(text[1:], root),))
    if text.startswith("@"):
        return _file(text[1:], root)
    if match := re.fullmatch(r"(row|column|tile)\((\d+)\)", text):
        return Tokens(match[1], (int(match[2]),))
    if text not in token_names.SELECTORS:
        known = ", ".join(token_names.SELECTORS)
        raise KeyError(f"unknown token kind '{text}'; known: {known}")
    return Tokens(text)


def _kinds(text: str, root: pathlib.Path) -> tuple[str, ...]:
    known = token_names.KINDS[1:]
    names = known if text == "kind" else tuple(text.split(","))
    if names == ("tile",):
        return names
    if unknown := set(names) - set(known):
        raise ValueError(f"unknown token kind '{min(unknown)}'; known: {', '.join(known)}")
    return names


def _count(text: str, root: pathlib.Path) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"k={text} is not a whole number from 1")
    return int(text)


def _word(text: str, root: pathlib.Path) -> str:
    return text


_READERS: dict[str, Callable[[str, pathlib.Path], Option]] = {
    "where": parse_where,
    "to": parse_where,
    "on": parse_where,
    "source": _index,
    "into": _index,
    "basis": _value,
    "edges": _value,
    "steps": _value,
    "by": _kinds,
    "k": _count,
    "heads": _word,
}
