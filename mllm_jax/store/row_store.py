"""Keep arrays on disk that grow by rows, with fingerprints of their dependencies."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.sharding import hosts
from mllm_jax.store.files import (
    atomic_json,
    damaged_error,
    naming_path,
    parse_json_object,
    record_in_journal,
    remove,
)
from mllm_jax.store.resumable import ResumableStore

_MAX_READ_BYTES = 2**24  # bytes that are hashed at a time


class RowStore(ResumableStore):
    """Arrays that grow by rows: one .npy file for each, and a record of the finished rows.

    Rows are written before the record counts them, so a killed run leaves no partial row. The
    record holds a checksum of the rows. Process 0 writes, and all processes read.

    Args:
      record: The path of the record, a .json file.
      file: A function that returns the path of an array from its name.
      count: The number of rows when all are done.
      restart: Whether to remove an existing record.
      **parts: The dependencies, as in `Store`.
    """

    path: pathlib.Path

    def __init__(
        self,
        record: str | pathlib.Path,
        file: Callable[[str], pathlib.Path],
        count: int,
        *,
        restart: bool = False,
        **parts: Any,
    ) -> None:
        super().__init__(record, parts)
        self._file, self.count = file, count
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}  # dtype and shape of a row
        self._sums: dict[str, Any] = {}  # running checksums of the rows
        if restart:
            remove(self.path)
        if hosts.broadcast_from_primary(self.path.exists()):
            self._open()

    def _open(self) -> None:
        record = parse_json_object(self.path, self.path.read_text("utf-8", "replace"))
        self._check(record)
        try:
            for name, (dtype, shape, digest) in record["arrays"].items():
                self._kinds[name] = dtype, tuple(shape)
                path, rows = self._file(name), record["done"]
                self._sums[name] = _verified_checksum(
                    path, dtype, tuple(shape), rows, digest
                ).copy()
        except (KeyError, TypeError) as error:
            raise damaged_error(self.path, error) from error
        if hosts.is_primary() and record["done"] <= self.count:
            for name in self._kinds:
                self._shape(name)

    def append(self, items: Sequence[Any], values: Mapping[str, np.ndarray]) -> None:
        """Write the rows of some items.

        Args:
          items: The items, whose content is compared when the store is resumed.
          values: One row for each item, by name of the array.
        """
        values = {name: np.ascontiguousarray(rows) for name, rows in values.items()}
        for name, rows in values.items():
            if name not in self._kinds:
                self._kinds[name] = rows.dtype.str, rows.shape[1:]
                self._sums[name] = hashlib.sha256()
                self._shape(name)
            self._sums[name].update(_byte_view(rows))
            if hosts.is_primary():
                path = self._file(name)
                with naming_path(path), open(path, "r+b") as file:
                    file.seek(len(self._header(name)) + self.done * rows[:1].nbytes)
                    file.write(_byte_view(rows))
                    file.flush()
                    os.fsync(file.fileno())
        for item in items:
            self.add(item)
        arrays = {n: [*kind, self._sums[n].hexdigest()] for n, kind in self._kinds.items()}
        atomic_json(self.path, self._record() | {"arrays": arrays})

    def arrays(self) -> dict[str, np.ndarray]:
        """Wait for all processes, and return the arrays, memory-mapped."""
        hosts.barrier(str(self.path))
        return {name: np.load(self._file(name), mmap_mode="r") for name in sorted(self._kinds)}

    def _header(self, name: str) -> bytes:
        dtype, shape = self._kinds[name]
        return _npy_header(dtype, (self.count, *shape))

    def _shape(self, name: str) -> None:
        """Allocate the file for all rows; existing rows are kept."""
        if not hosts.is_primary():
            return
        path, (dtype, shape) = self._file(name), self._kinds[name]
        header = self._header(name)
        size = len(header) + self.count * int(np.prod(shape)) * np.dtype(dtype).itemsize
        with naming_path(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            record_in_journal(path)
            if self._kept[0] and path.stat().st_size == size and _starts_with(path, header):
                return
            with open(path, "r+b" if self._kept[0] else "wb") as file:
                file.write(header)
                file.truncate(size)


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(header, about | {"shape": shape})
    return (
        header.getvalue()
    )  # NumPy pads it, so that its length does not depend on the number of rows


def _starts_with(path: pathlib.Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _verified_checksum(
    path: pathlib.Path, dtype: str, shape: tuple[int, ...], rows: int, digest: str
):
    """Return the running checksum of the finished rows of a file.

    Raises:
      ValueError: They are not what was written.
    """
    length = rows * int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        stat = path.stat()
        stamp = stat.st_size, stat.st_mtime_ns, stat.st_ino
        found = _checksum(path, len(_npy_header(dtype, (rows, *shape))), length, stamp)
    except OSError as error:
        raise damaged_error(path, error.strerror) from error
    if found.hexdigest() != digest:
        raise damaged_error(path, f"its first {rows} rows are not those that were written")
    return found


@functools.lru_cache(64)
def _checksum(path: pathlib.Path, start: int, length: int, stamp: tuple[int, int, int]):
    """Return the checksum of a part of a file, cached by the stamp of the file."""
    del stamp
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while length and (some := file.read(min(length, _MAX_READ_BYTES))):
            digest.update(some)
            length -= len(some)
    return digest


def _byte_view(rows: np.ndarray) -> memoryview:
    return rows.reshape(-1).view(np.uint8).data
