"""Files of a user: regular files alone, read whole, and named in errors of one line."""

from __future__ import annotations

import os
import stat


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """The content of a regular file.

    A pipe or a device never ends, and opening one can wait for ever: it is refused unopened.

    Args:
      path: of the file; links are followed.
      limit: the most bytes that it may have.

    Raises:
      OSError: it is missing, no regular file, or too large; the reason alone, without the path.
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


def name(path: object, most: int = 120) -> str:
    """A path, or what else a user wrote, for one line: its end if it is long."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))
    return text if len(text) <= most else f"...{text[3 - most :]}"


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: it holds no half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def reason(error: BaseException | None) -> str:
    """What an error says, in one short line."""
    return line(str(getattr(error, "strerror", None) or error), 160) or type(error).__name__


def line(text: str, most: int = 390) -> str:
    """A text as one line, cut if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
