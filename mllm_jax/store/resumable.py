"""Keep arrays in one file with fingerprints of their dependencies.

The file is read, or resumed after a killed run, only for the same dependencies; a file with other
dependencies, or a damaged one, is refused in one line.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from mllm_jax.sharding import hosts
from mllm_jax.store.files import atomic_npz, damaged_error, parse_json_object, read_npz, remove
from mllm_jax.store.fingerprints import fingerprint
from mllm_jax.typing import Indexed

FORMAT = 1  # of the files of a store; increase it with every change of the format
_RECORD = "record"  # the member of a store that holds its dependencies


class ResumableStore:
    """The dependencies of a result on disk, and the number of items it contains.

    Attributes:
      path: The file; None stores nothing.
      parts: Fingerprints of its dependencies, by name.
      done: The number of items that it contains so far.
      data: The fingerprint of these items.
    """

    def __init__(self, path: str | pathlib.Path | None, parts: Mapping[str, Any]):
        self.path = None if path is None else pathlib.Path(path)
        self.parts = {} if self.path is None else part_fingerprints(parts)
        self.done, self.data = 0, ""
        self._kept = 0, ""

    def resume(self, items: Iterable[Any]) -> Iterator[Any]:
        """Return the items that are not done yet.

        Args:
          items: All items. Finished ones are read again, to compare their content.

        Raises:
          ValueError: The first items differ from the finished ones, or there are fewer items.
        """
        count, data = self._kept
        if isinstance(items, Sized) and len(items) < count:
            raise self._fewer(count, len(items))
        rest = _iterate(items)
        for number in range(count):
            try:
                self.add(next(rest))
            except StopIteration:
                raise self._fewer(count, number) from None
        if self.data != data:
            raise mismatch_error(self.path, [f"data (what the first {count} were)"])
        return rest

    def add(self, item: Any) -> None:
        """Count an item as done, from the next write on."""
        self.done += 1
        if self.path is not None:
            self.data = fingerprint(self.data, item)

    def _fewer(self, count: int, asked: int) -> ValueError:
        return ValueError(
            f"{self.path} contains {count}, but only {asked} are requested: request at least as "
            "many, give another path, or start over with restart=True (for a study, --restart)"
        )

    def _record(self) -> dict[str, Any]:
        return {"format": FORMAT, "parts": self.parts, "done": self.done, "data": self.data}

    def _check(self, record: Mapping[str, Any]) -> None:
        assert self.path is not None  # it holds the record
        require_same_parts(self.path, record, self.parts)
        self._kept = record["done"], record["data"]


def _iterate(items: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the items; a sequence ends by its length."""
    if isinstance(items, Indexed):
        return (items[i] for i in range(len(items)))
    return iter(items)


class Store(ResumableStore):
    """Arrays in one .npz file, which is replaced atomically.

    Process 0 writes it, and all processes read it.

    Args:
      path: The file; None stores nothing.
      restart: Whether to remove an existing file.
      **parts: The dependencies of the arrays, by name, such as `model=` and `settings=`: any
        content that `fingerprint` takes. The entries of a mapping are compared one by one.
    """

    def __init__(
        self, path: str | pathlib.Path | None, *, restart: bool = False, **parts: Any
    ) -> None:
        super().__init__(path, parts)
        if restart and self.path is not None:
            remove(self.path)

    def read(self) -> dict[str, np.ndarray] | None:
        """Return the arrays; None if there are none yet.

        Raises:
          ValueError: They have other dependencies, or the file is damaged.
        """
        if self.path is None or not hosts.broadcast_from_primary(self.path.exists()):
            return None
        arrays = read_npz(self.path)
        record = parse_json_object(self.path, str(arrays.pop(_RECORD, "{}")))
        self._check(record)
        if sorted(arrays) != record.get("arrays"):
            raise damaged_error(self.path, "it does not hold the arrays that it lists")
        for name, dtype in record["dtypes"].items():
            arrays[name] = arrays[name].view(dtype)
        return arrays

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Replace the file by these arrays and the count of items that are done."""
        if self.path is None:
            return
        arrays = {n: a if hasattr(a, "dtype") else np.asarray(a) for n, a in arrays.items()}
        # NumPy's format does not keep dtypes such as bfloat16.
        other = {name: str(a.dtype) for name, a in arrays.items() if a.dtype.kind == "V"}
        plain = {n: a.view(f"u{a.dtype.itemsize}") if n in other else a for n, a in arrays.items()}
        record = self._record() | {"arrays": sorted(plain), "dtypes": other}
        text = json.dumps(record, sort_keys=True)
        atomic_npz(self.path, {_RECORD: np.array(text), **plain})


def part_fingerprints(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of each part; for a mapping, those of its entries."""
    return {
        name: {key: fingerprint(item) for key, item in part.items()}
        if isinstance(part, dict) and part and all(isinstance(key, str) for key in part)
        else fingerprint(part)
        for name, part in parts.items()
    }


def require_same_parts(
    path: pathlib.Path, record: Mapping[str, Any], parts: Mapping[str, Any]
) -> None:
    """Refuse a record with other parts, or in another format.

    Raises:
      ValueError: The record differs.
    """
    if record.get("format") != FORMAT:
        raise mismatch_error(path, ["format (it is of another version of this library)"])
    if record.get("parts") != parts:
        raise mismatch_error(path, differences(record.get("parts") or {}, parts))


def mismatch_error(path: pathlib.Path | None, differ: Sequence[str]) -> ValueError:
    """Return the error about a file with other dependencies."""
    names = ", ".join(differ)
    names = names if len(names) < 160 else f"{names[:160]}..."
    return ValueError(
        f"{path} was made for something else: it differs in {names}; give another path, or start "
        "over with restart=True (for a study, --restart)"
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the names that differ, with the entries of mappings in brackets."""
    differ = []
    for name in sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            differ.append(f"{name} ({', '.join(differences(left, right))})")
        else:
            differ.append(name)
    return differ
