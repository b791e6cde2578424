"""Write files atomically, remove remains of killed processes, and find the user's cache."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import socket
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_jax.sharding import hosts, mesh


@contextlib.contextmanager
def atomic(path: str | pathlib.Path):
    """Open a binary file that replaces `path` only when it is complete.

    Of several processes only process 0 writes, and the output of the others is discarded. In the
    cache, which may be local to each host, all processes write.
    """
    path = pathlib.Path(path)
    if not (hosts.is_primary() or path.is_relative_to(cache_directory())):
        with tempfile.TemporaryFile() as nowhere:  # zipfile needs a seekable file
            yield nowhere
        return
    with naming_path(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        record_in_journal(path)
    temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    try:
        with naming_path(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with naming_path(path):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_HOST = re.sub(r"\W", "-", socket.gethostname())
_ABANDONED = re.compile(rf"\..+\.{re.escape(_HOST)}\.(\d+)\.partial")


@contextlib.contextmanager
def naming_path(path: pathlib.Path):
    """Name the file in errors about writing it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; free some space and start again: "
            "finished work is kept",
        ) from error


@functools.cache
def _remove_abandoned(folder: pathlib.Path) -> None:
    """Remove temporary files of processes of this host that were killed."""
    for path in folder.iterdir():
        match = _ABANDONED.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process belongs to another user
        return True
    return True


def write(path: str | pathlib.Path, content: str | bytes) -> None:
    """Write a file atomically: bytes, or text in UTF-8."""
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def atomic_json(path: str | pathlib.Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    write(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | pathlib.Path) -> Any:
    """Read a JSON file."""
    return json.loads(pathlib.Path(path).read_text())


def atomic_npz(path: str | pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as .npz, one in memory at a time; equal arrays give equal bytes."""
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # ZipInfo sets a constant time of modification.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, mesh.to_numpy(array), allow_pickle=False)


def read_npz(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz file and verify its checksums.

    Raises:
      ValueError: The file is damaged, or holds Python objects.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                content = io.BytesIO(archive.read(member))  # a complete read verifies the checksum
                array = np.lib.format.read_array(content, allow_pickle=False)
                arrays[member.removesuffix(".npy")] = array
    except FileNotFoundError:
        raise
    except Exception as error:  # readers raise many kinds of errors for damaged files
        raise damaged_error(path, error) from error
    return arrays


def damaged_error(path: str | pathlib.Path, why: object) -> ValueError:
    """Return the error about a damaged file."""
    reason = " ".join(str(why).split())[:80]
    return ValueError(
        f"{path} is damaged ({reason}): remove it, or start over with restart=True (for a study, "
        "--restart)"
    )


def cache_directory() -> pathlib.Path:
    """Return the folder for files that can be recreated: `MLLM_JAX_CACHE`, or the user's cache."""
    if own := os.environ.get("MLLM_JAX_CACHE"):
        return pathlib.Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "mllm_jax"


def parse_json_object(path: pathlib.Path, text: str) -> dict[str, Any]:
    """Parse the text of a file as a JSON object.

    Raises:
      ValueError: It is not a JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise damaged_error(path, error) from error
    if not isinstance(value, dict):
        raise damaged_error(path, "not a JSON object")
    return value


def remove(path: pathlib.Path) -> None:
    """Remove a file, if it exists, for all processes."""
    if hosts.is_primary():
        path.unlink(missing_ok=True)
    hosts.barrier(f"remove {path}")


JOURNAL = ".written"  # in a workdir: the list of files that studies wrote, one per line


@functools.cache
def find_journal(folder: pathlib.Path) -> pathlib.Path | None:
    """Return the path of the journal of the workdir that contains a folder."""
    return next((f / JOURNAL for f in (folder, *folder.parents) if (f / JOURNAL).exists()), None)


@functools.cache
def read_journal(journal: pathlib.Path) -> set[str]:
    """Return the lines of a journal; cached by this process."""
    return set(journal.read_text().splitlines())


def record_in_journal(path: pathlib.Path) -> None:
    """Record in the journal that a study writes this file, or everything in this folder."""
    if journal := find_journal(path.parent):
        line = f"{path.relative_to(journal.parent)}{'/' if path.is_dir() else ''}"
        if line not in read_journal(journal):
            read_journal(journal).add(line)
            with journal.open("a") as file:
                file.write(f"{line}\n")
