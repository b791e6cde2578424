"""Store tables of rows in safetensors shards, which grow item by item and are read in any order."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_jax.checkpoints import tensors
from mllm_jax.sharding import hosts
from mllm_jax.store import files, fingerprints, stamps
from mllm_jax.store.resumable import FORMAT, ResumableStore, mismatch_error
from mllm_jax.typing import Int, Shaped

RECORD = "record.json"
_NAME = re.compile(r"\d{8}-\d{8}\.safetensors")  # the first item, and the one after the last
Table = Mapping[str, Shaped[np.ndarray, "n ..."]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of rows.

    Attributes:
      file: The name of the file, which contains the range of its items.
      first: The first item whose rows it holds.
      bytes: The size of its rows in bytes.
      digest: The fingerprint of the file.
    """

    file: str
    first: int
    bytes: int
    digest: str


class ShardStore(ResumableStore):
    """Tables that grow by the rows of items, in shards, with a record of their dependencies.

    A shard holds the rows of consecutive items. It is written before the record counts it, so a
    killed run leaves no partial rows. A last shard that is not full is continued under another
    name: the files do not depend on where a run was interrupted. Process 0 writes, and all read.

    Args:
      folder: The folder of the shards and of their record.
      shard_bytes: The number of bytes at which a shard is full.
      restart: Whether to remove an existing record and its shards.
      **parts: The dependencies, as in `Store`.

    Attributes:
      examples: The number of examples of the items that are done.
    """

    path: pathlib.Path

    def __init__(
        self, folder: str | pathlib.Path, *, shard_bytes: int, restart: bool = False, **parts: Any
    ) -> None:
        self.folder = pathlib.Path(folder)
        super().__init__(self.folder / RECORD, parts)
        self.examples = 0
        self._shard_bytes = shard_bytes
        self._full: list[Shard] = []
        self._begun: Shard | None = None  # on disk and not full: the first of `_buffer`
        self._buffer: list[dict[str, np.ndarray]] = []
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}  # dtype and shape of a row
        self._first, self._is_saved = 0, True
        if restart:
            files.remove(self.path)
        if hosts.broadcast_from_primary(self.path.exists()):
            self._open()
        self._remove_other_shards()

    def append(self, item: Any, tables: Mapping[str, Table], examples: int) -> None:
        """Add the rows of an item, and write a shard when there are enough.

        Args:
          item: The item, whose content is compared when the store is resumed.
          tables: Arrays with the same number of rows, by name of the table and the array.
          examples: The number of examples in the item.

        Raises:
          ValueError: Rows differ in shape or dtype from those before.
          OSError: The disk is full; rows written before are kept.
        """
        rows = {f"{name}/{key}": a for name, table in tables.items() for key, a in table.items()}
        for key, array in rows.items():
            kind = array.dtype, array.shape[1:]
            if (before := self._kinds.setdefault(key, kind)) != kind:
                raise ValueError(
                    f"{self.folder}: {key} of item {self.done} has rows {kind[1]} in {kind[0]}, "
                    f"earlier items have {before[1]} in {before[0]}"
                )
        self.add(item)
        self.examples += examples
        self._buffer.append(rows)
        self._is_saved = False
        if self._buffered_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write all rows that are not written yet."""
        if self._is_saved:
            return
        name = f"{self._first:08d}-{self.done:08d}.safetensors"
        path, size = self.folder / name, self._buffered_bytes
        rows = {k: np.concatenate([part[k] for part in self._buffer]) for k in self._buffer[0]}
        tensors.write(rows, path)
        digest = fingerprints.file(path) if hosts.is_primary() else ""
        shard, begun = Shard(name, self._first, size, digest), self._begun
        shards = [dataclasses.asdict(each) for each in (*self._full, shard)]
        record = self._record() | {"shards": shards, "examples": self.examples}
        files.atomic_json(self.path, record)
        self._is_saved, self._begun, self._buffer = True, shard, [rows]
        if begun is not None:
            files.remove(self.folder / begun.file)
        if size >= self._shard_bytes:
            self._start_shard(shard)

    @property
    def _buffered_bytes(self) -> int:
        return sum(array.nbytes for part in self._buffer for array in part.values())

    def _start_shard(self, full: Shard) -> None:
        self._full.append(full)
        self._begun, self._buffer, self._first = None, [], self.done

    def _open(self) -> None:
        record = read_record(self.folder)
        self._check(record)
        shards = verified_shards(self.folder, record)
        self.examples = record["examples"]
        self._full, self._first = shards, record["done"]
        stored = tensors.open_file(self.folder / shards[-1].file)
        self._kinds = {tensor.key: (tensor.dtype, tensor.shape[1:]) for tensor in stored}
        if shards[-1].bytes < self._shard_bytes:
            self._begun = self._full.pop()
            self._first = self._begun.first
            self._buffer = [{tensor.key: tensor.read() for tensor in stored}]

    def _remove_other_shards(self) -> None:
        """Remove shards that a killed run wrote without updating its record."""
        known = {shard.file for shard in (*self._full, self._begun) if shard is not None}
        if hosts.is_primary() and self.folder.is_dir():
            for path in self.folder.iterdir():
                if _NAME.fullmatch(path.name) and path.name not in known:
                    path.unlink()
        hosts.barrier(f"shards of {self.folder}")


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """Return the record of a folder of shards.

    Raises:
      FileNotFoundError: There is no record.
      ValueError: It is damaged, or in the format of another version.
    """
    path = folder / RECORD
    try:
        record = files.parse_json_object(path, path.read_text("utf-8", "replace"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: missing; this folder holds no collection") from error
    if record.get("format") != FORMAT:
        raise mismatch_error(path, ["format (it is of another version of this library)"])
    if not record.get("shards") or not {"done", "data", "examples"} <= record.keys():
        raise files.damaged_error(path, "it names no shards")
    return record


def verified_shards(folder: pathlib.Path, record: Mapping[str, Any]) -> list[Shard]:
    """Return the shards of a record after a check of their content.

    Raises:
      ValueError: A file is damaged or missing.
    """
    try:
        shards = [Shard(**shard) for shard in record["shards"]]
        digests = {shard.file: shard.digest for shard in shards}
        if not all(_NAME.fullmatch(name) for name in digests):
            raise ValueError("a shard has another name")
        wrong = stamps.check(folder, digests, fingerprints.file)
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged_error(folder / RECORD, error) from error
    if wrong is not None:
        raise files.damaged_error(folder / wrong, "it is not the file that was written")
    return shards


class TableReader:
    """A table of a folder of shards, whose rows are read in any order by memory map.

    Args:
      folder: The folder.
      name: The name of the table.

    Attributes:
      kinds: The dtype of each array and the shape of its rows, by name.
    """

    def __init__(self, folder: pathlib.Path, name: str) -> None:
        record = read_record(folder)
        shards = verified_shards(folder, record)
        self.kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._bytes: dict[str, list[np.ndarray]] = {}  # of each array in each shard, uint8[n, row]
        counts = []
        for shard in shards:
            stored = tensors.open_file(folder / shard.file)
            own = {t.key.rpartition("/")[2]: t for t in stored if t.key.rpartition("/")[0] == name}
            if not own:
                known = sorted({tensor.key.rpartition("/")[0] for tensor in stored})
                raise KeyError(f"{folder} has no '{name}'; it has: {', '.join(known)}")
            for key, tensor in own.items():
                self.kinds[key] = tensor.dtype, tensor.shape[1:]
                rows = tensor.read().reshape(tensor.shape[0], -1).view(np.uint8)
                self._bytes.setdefault(key, []).append(rows)
            counts.append(next(iter(own.values())).shape[0])
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """Return some rows of every array.

        Raises:
          IndexError: An index is out of range.
        """
        count, indices = len(self), np.asarray(indices, np.int64)
        wrong = indices[(indices < -count) | (indices >= count)]
        if wrong.size:
            raise IndexError(f"row {wrong[0]} of {count}")
        indices = indices % max(count, 1)
        order = np.argsort(indices)  # files are read in their own order
        ascending = indices[order]
        ends = np.searchsorted(ascending, self._starts)
        taken = {}
        for key, (dtype, shape) in self.kinds.items():
            shards = self._bytes[key]
            rows = np.empty((len(indices), shards[0].shape[1]), np.uint8)
            for number in np.flatnonzero(np.diff(ends)):
                at = slice(ends[number], ends[number + 1])
                local = ascending[at] - self._starts[number]
                rows[order[at]] = shards[number].take(local, 0)
            taken[key] = rows.view(dtype).reshape(len(indices), *shape)
        return taken


def table_names(folder: pathlib.Path, record: Mapping[str, Any]) -> list[str]:
    """Return the names of the tables."""
    stored = tensors.open_file(folder / record["shards"][0]["file"])
    return sorted({tensor.key.rpartition("/")[0] for tensor in stored})


def free_bytes(folder: pathlib.Path) -> int:
    """Return the free bytes on the disk of a folder, which may not exist yet."""
    exists = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(exists).free
