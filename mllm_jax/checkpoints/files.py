"""Files that somebody else wrote: opened without trust, and refused in one short line."""

from __future__ import annotations

import json
import os
import pathlib
import reprlib
from collections.abc import Iterable
from typing import Any

LINE = 399  # most characters of an error message
_JSON_BYTES = 16 * 2**20


def line(text: object, length: int = LINE) -> str:
    """Text of a hostile file in one line: control characters escaped, the middle left out."""
    words = str(text)[: 64 * length]  # escaping what is cut anyway would take time
    words = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(words) <= length:
        return words
    head = length * 3 // 4
    return f"{words[:head]} ... {words[head + 5 - length :]}"


def some(items: Iterable[object], most: int = 3, length: int = 60) -> str:
    """The first few of many names, each cut, and how many more there are."""
    items = list(items)
    named = ", ".join(
        line(item, length) if isinstance(item, str) else shown(item) for item in items[:most]
    )
    return named if len(items) <= most else f"{named} and {len(items) - most} more"


def shown(value: object, length: int = 60) -> str:
    """A value of a hostile file as Python writes it, whatever its size and depth."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 2, 4, 4, 4
    short.maxstring = short.maxother = length
    try:
        return line(short.repr(value), length)
    except ValueError:  # Python writes no integer of thousands of digits
        return f"a {type(value).__name__}"


def refusal(source: object, problems: Iterable[object]) -> str:
    """The message of an error: the file, and as many of its problems as a line holds."""
    return joined([f"{line(source, 200)}: {problem}" if n == 0 else problem
                   for n, problem in enumerate(problems)])  # fmt: skip


def joined(problems: Iterable[object]) -> str:
    """As many problems as a line holds, the first at least, and how many more there are."""
    first, *rest = problems
    message = line(first, LINE - 30)
    for n, problem in enumerate(rest):
        problem = f"; {line(problem)}"
        if len(message) + len(problem) > LINE - 20:
            return f"{message}; and {len(rest) - n} more"
        message += problem
    return message


def regular(path: str | os.PathLike) -> pathlib.Path:
    """The path of a file that has an end: no directory, pipe or device is opened.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is something else than a regular file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{line(path, 300)}: missing; fetch it again")
    if not path.is_file():
        raise OSError(f"{line(path, 300)}: not a regular file; fetch it again")
    return path


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is not a regular file.
        ValueError: it is not an object in UTF-8, or one of its names is there twice.
    """
    path = regular(path)
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{line(path, 300)}: {path.stat().st_size:,} bytes are too many for JSON")
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, source: object) -> dict[str, Any]:
    """The JSON object of some bytes; `source` is what to call them. See `read_json`."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number
        )
    except RecursionError as error:
        raise ValueError(refusal(source, ["not readable as JSON (nested too deeply)"])) from error
    except ValueError as error:  # of syntax, of UTF-8
        reason = line(error, 120)
        raise ValueError(refusal(source, [f"not readable as JSON ({reason})"])) from error
    if not isinstance(value, dict):
        raise ValueError(
            refusal(source, [f"holds {type(value).__name__} instead of a JSON object"])
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{line(name, 60)!r} is there twice")
        fields[name] = value
    return fields


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")
