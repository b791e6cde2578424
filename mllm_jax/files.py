"""Open untrusted files safely, and refuse them in one short line."""

from __future__ import annotations

import json
import os
import pathlib
import reprlib
import stat
from collections.abc import Iterable
from typing import Any

LINE = 399  # the largest number of characters of an error message
_JSON_BYTES = 16 * 2**20


def line(text: object, length: int = LINE) -> str:
    """Return text as one line: control characters are escaped, the middle of a long one is cut."""
    words = str(text)[: 64 * length]  # do not spend time to escape text that is cut anyway
    words = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(words) <= length:
        return words
    head = length * 3 // 4
    return f"{words[:head]} ... {words[head + 5 - length :]}"


def name(path: object, length: int = 120) -> str:
    """Return a path, or other text of a user, for one line; only the end of a long one is kept."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))
    return text if len(text) <= length else f"...{text[3 - length :]}"


def reason(error: BaseException | None) -> str:
    """Return the message of an error as one short line."""
    message = " ".join(str(getattr(error, "strerror", None) or error).split())
    return line(message, 160) or type(error).__name__


def is_text(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8: it has no unpaired surrogates."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def some(items: Iterable[object], most: int = 3, length: int = 60) -> str:
    """Return the first few of many names, each cut, and how many more there are."""
    items = list(items)
    named = ", ".join(
        line(item, length) if isinstance(item, str) else shown(item) for item in items[:most]
    )
    return named if len(items) <= most else f"{named} and {len(items) - most} more"


def shown(value: object, length: int = 60) -> str:
    """Return a value of a hostile file as Python writes it, whatever its size and depth."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 2, 4, 4, 4
    short.maxstring = short.maxother = length
    try:
        return line(short.repr(value), length)
    except ValueError:  # Python writes no integer of thousands of digits
        return f"a {type(value).__name__}"


def refusal(source: object, problems: Iterable[object]) -> str:
    """Return the message of an error: the file, and as many of its problems as a line holds."""
    return joined([f"{line(source, 200)}: {problem}" if n == 0 else problem
                   for n, problem in enumerate(problems)])  # fmt: skip


def unavailable(name: object, error: Exception) -> FileNotFoundError:
    """Return the error about a name that is neither a directory nor available from the hub.

    Args:
      name: The name.
      error: The error of the hub's client: it is offline, or the name is unknown or invalid.
    """
    first, *_ = str(error).splitlines() or [""]
    return FileNotFoundError(
        f"'{line(name, 120)}' is not a directory and not available from the hub: {line(first, 180)}"
    )


def joined(problems: Iterable[object]) -> str:
    """Return as many problems as fit in a line, at least one, and the number of the others."""
    first, *rest = problems
    message = line(first, LINE - 30)
    for n, problem in enumerate(rest):
        problem = f"; {line(problem)}"
        if len(message) + len(problem) > LINE - 20:
            return f"{message}; and {len(rest) - n} more"
        message += problem
    return message


def regular(path: str | os.PathLike) -> pathlib.Path:
    """Return the path of a regular file; a pipe or a device, which may never end, is not opened.

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It is not a regular file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{line(path, 300)}: missing; fetch it again")
    if not path.is_file():
        raise OSError(f"{line(path, 300)}: not a regular file; fetch it again")
    return path


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """Return the content of a regular file; a pipe or a device is not opened.

    Args:
      path: The file; links are followed.
      limit: The largest size in bytes.

    Raises:
      OSError: The file is missing, not regular or too large; the message is only the reason.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise OSError("it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is a pipe or a device, not a regular file")
    if status.st_size > limit:
        raise OSError(f"it has {status.st_size:,} bytes, more than {limit:,}")
    with open(path, "rb") as file:
        return file.read()


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It is not a regular file.
      ValueError: It is not an object in UTF-8, or one of its names occurs twice.
    """
    path = regular(path)
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{line(path, 300)}: {path.stat().st_size:,} bytes are too many for JSON")
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, source: object) -> dict[str, Any]:
    """Return the JSON object in bytes, see `read_json`; `source` is their name in an error."""
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
            raise ValueError(f"{line(name, 60)!r} occurs twice")
        fields[name] = value
    return fields


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")
