"""Verify large files once, and again only when their size or time has changed."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping

NAME = ".checked.json"  # beside the files: the size and time of each when it was verified


def check(
    folder: pathlib.Path,
    expected: Mapping[str, str],
    digest: Callable[[pathlib.Path], str],
) -> str | None:
    """Compare the files of a folder with their expected digests.

    Args:
      folder: The folder.
      expected: The digest of each file, by name.
      digest: A function that computes the digest of a file; called only for files that have changed
        since the last check.

    Returns:
      The name of the first file that differs; None if none does.
    """
    before = _read(folder)
    now = {}
    for name, wanted in expected.items():
        try:
            stat = (folder / name).stat()
            now[name] = [stat.st_size, stat.st_mtime_ns, wanted]
            if now[name] != before.get(name) and digest(folder / name) != wanted:
                return name
        except FileNotFoundError:
            return name
    if now != before:
        with contextlib.suppress(OSError):  # in a read-only folder files are verified each time
            (folder / NAME).write_text(json.dumps(now))
    return None


def forget(folder: pathlib.Path) -> None:
    """Discard the results of earlier checks in and below a folder."""
    for stamp in folder.rglob(NAME):
        stamp.unlink(missing_ok=True)


def _read(folder: pathlib.Path) -> dict[str, list]:
    try:
        found = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
