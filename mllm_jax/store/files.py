"""Files: atomic writes, what a killed process left, and the user's cache."""

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
    """A file to write in binary; it takes the place of `path` only when it is whole.

    Of several processes only the first writes, and what the others write is dropped; but in the
    cache, which may be a folder of each host, all do.
    """
    path = pathlib.Path(path)
    if not (hosts.is_primary() or path.is_relative_to(cache_directory())):
        with tempfile.TemporaryFile() as nowhere:  # an archive looks where it is in the file
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
    """Says of an error of the disk which file could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; free some space and start again: "
            "what was finished is kept",
        ) from error


@functools.cache
def _remove_abandoned(folder: pathlib.Path) -> None:
    """Removes the temporaries of processes of this host that were killed."""
    for path in folder.iterdir():
        found = _ABANDONED.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is of another user
        return True
    return True


def write(path: str | pathlib.Path, content: str | bytes) -> None:
    """A whole file or none: bytes, or text in UTF-8."""
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def atomic_json(path: str | pathlib.Path, value: Any) -> None:
    """Sorted keys and no time in it: the same value is the same bytes."""
    write(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | pathlib.Path) -> Any:
    """Read a JSON file."""
    return json.loads(pathlib.Path(path).read_text())


def atomic_npz(path: str | pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Arrays as NumPy's .npz, one in memory at a time; the same arrays are the same bytes."""
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # The time of a member is always 1980.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, mesh.to_numpy(array), allow_pickle=False)


def read_npz(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz, whose checksums are right.

    Raises:
      ValueError: the file is damaged, or holds Python objects.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                content = io.BytesIO(archive.read(member))  # whole: then its checksum is looked at
                array = np.lib.format.read_array(content, allow_pickle=False)
                arrays[member.removesuffix(".npy")] = array
    except FileNotFoundError:
        raise
    except Exception as error:  # there is no end to what readers say of damaged files
        raise damaged_error(path, error) from error
    return arrays


def damaged_error(path: str | pathlib.Path, why: Any) -> ValueError:
    """Return the error of a file whose content cannot be read."""
    reason = " ".join(str(why).split())[:80]
    return ValueError(
        f"{path} is damaged ({reason}): remove it, or start over with restart=True (--restart of "
        "a study)"
    )


def cache_directory() -> pathlib.Path:
    """The folder for files that can be made again: `MLLM_JAX_CACHE`, or the user's cache."""
    if own := os.environ.get("MLLM_JAX_CACHE"):
        return pathlib.Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "mllm_jax"


def parse_json_object(path: pathlib.Path, text: str) -> dict[str, Any]:
    """Parse the text of a JSON file that must contain an object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise damaged_error(path, error) from error
    if not isinstance(found, dict):
        raise damaged_error(path, "no JSON object")
    return found


def remove(path: pathlib.Path) -> None:
    """Remove a file in the primary process; all processes wait for it."""
    if hosts.is_primary():
        path.unlink(missing_ok=True)
    hosts.barrier(f"remove {path}")


JOURNAL = ".written"  # of a workdir: the files that studies wrote, one a line


@functools.cache
def find_journal(folder: pathlib.Path) -> pathlib.Path | None:
    """The journal of the workdir that a folder is in."""
    return next((f / JOURNAL for f in (folder, *folder.parents) if (f / JOURNAL).exists()), None)


@functools.cache
def read_journal(journal: pathlib.Path) -> set[str]:
    """The lines of a journal, as this process knows them."""
    return set(journal.read_text().splitlines())


def record_in_journal(path: pathlib.Path) -> None:
    """Write down, once, that a study writes this file of a workdir, or all of this folder."""
    if journal := find_journal(path.parent):
        line = f"{path.relative_to(journal.parent)}{'/' if path.is_dir() else ''}"
        if line not in read_journal(journal):
            read_journal(journal).add(line)
            with journal.open("a") as file:
                file.write(f"{line}\n")
