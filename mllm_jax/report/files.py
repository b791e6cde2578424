"""Whole files or none: a reader never sees half a file, whenever the writer is killed."""

from __future__ import annotations

import os
import pathlib


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file atomically and makes its folder if need be.

    Args:
        path: where to; an existing file is replaced.
        content: bytes, or text to be encoded as UTF-8.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write ({error.strerror})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
