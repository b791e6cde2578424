"""Stamps: large files that are read whole once, and again when their size or time changed."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping

NAME = ".checked.json"  # beside the files: what each was when its content was found to be right


def check(
    folder: pathlib.Path,
    expected: Mapping[str, str],
    digest: Callable[[pathlib.Path], str],
) -> str | None:
    """Compares the content of files in a folder with what it has to be.

    Args:
      folder: the folder of the files.
      expected: the digest of each file, by name.
      digest: reads a file; called when the file is another than at the last check.

    Returns:
      The name of the first file that is not as expected; None if all are.
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
        with contextlib.suppress(OSError):  # a cache that cannot be written is looked at each time
            (folder / NAME).write_text(json.dumps(now))
    return None


def forget(folder: pathlib.Path) -> None:
    """Has all files in and below a folder looked at again."""
    for stamp in folder.rglob(NAME):
        stamp.unlink(missing_ok=True)


def _read(folder: pathlib.Path) -> dict[str, list]:
    try:
        found = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
