"""Arrays in one file that know what they were made for.

Asked for the same they are read, or resumed where a killed run left them; made for something else,
or damaged, they are refused in one line.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.sharding import hosts
from mllm_jax.store.files import atomic_npz, damaged_error, parse_json_object, read_npz, remove
from mllm_jax.store.fingerprints import fingerprint

FORMAT = 1  # of the files of a store; another one whenever they are written in another way
_RECORD = "record"  # the member of a store that says what it was made for


class ResumableStore:
    """What something on disk was made for, and how much of it is done.

    Attributes:
      path: None keeps nothing.
      parts: fingerprints of what it depends on.
      done: items that went in so far; `data` is the fingerprint of these.
    """

    def __init__(self, path: str | pathlib.Path | None, parts: Mapping[str, Any]):
        self.path = None if path is None else pathlib.Path(path)
        self.parts = {} if self.path is None else part_fingerprints(parts)
        self.done, self.data = 0, ""
        self._kept = 0, ""

    def resume(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items that are not done yet; those that are have to be the same as they were.

        Args:
          items: a sequence or any iterable, of which the first that were done are read again to
            compare their content.

        Raises:
          ValueError: they begin with others than those that are done, or are fewer.
        """
        count, data = self._kept
        if hasattr(items, "__len__") and len(items) < count:
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
        """Counts an item as done, from the next write on."""
        self.done += 1
        if self.path is not None:
            self.data = fingerprint(self.data, item)

    def _fewer(self, count: int, asked: int) -> ValueError:
        return ValueError(
            f"{self.path} is made of {count}, and only {asked} are asked for: ask for as many or "
            "more, give another path, or start over with restart=True (--restart of a study)"
        )

    def _record(self) -> dict[str, Any]:
        return {"format": FORMAT, "parts": self.parts, "done": self.done, "data": self.data}

    def _check(self, record: Mapping[str, Any]) -> None:
        require_same_parts(self.path, record, self.parts)
        self._kept = record["done"], record["data"]


def _iterate(items: Iterable[Any]) -> Iterator[Any]:
    """The items, one by one; a sequence need not say where it ends but by its length."""
    if hasattr(items, "__getitem__") and hasattr(items, "__len__"):
        return (items[i] for i in range(len(items)))
    return iter(items)


class Store(ResumableStore):
    """Arrays in one .npz file, which is replaced whole.

    Process 0 writes it, and all read what it wrote.

    Args:
      path: None keeps nothing.
      restart: remove what is there.
      parts: what the arrays depend on, by name, such as `model=` and `settings=`; of a mapping
        each entry. Any content that `fingerprint` takes.
    """

    def __init__(
        self, path: str | pathlib.Path | None, *, restart: bool = False, **parts: Any
    ) -> None:
        super().__init__(path, parts)
        if restart and self.path is not None:
            remove(self.path)

    def read(self) -> dict[str, np.ndarray] | None:
        """The arrays; None where there are none yet.

        Raises:
          ValueError: they were made for something else, or the file is damaged.
        """
        if self.path is None or not hosts.broadcast_from_primary(self.path.exists()):
            return None
        arrays = read_npz(self.path)
        record = parse_json_object(self.path, str(arrays.pop(_RECORD, "{}")))
        self._check(record)
        if sorted(arrays) != record.get("arrays"):
            raise damaged_error(self.path, "it does not hold the arrays that it names")
        for name, dtype in record["dtypes"].items():
            arrays[name] = arrays[name].view(dtype)
        return arrays

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Replaces the file by these arrays and what is `done`."""
        if self.path is None:
            return
        arrays = {n: a if hasattr(a, "dtype") else np.asarray(a) for n, a in arrays.items()}
        # Of bfloat16 and such NumPy's format knows the size alone.
        other = {name: str(a.dtype) for name, a in arrays.items() if a.dtype.kind == "V"}
        plain = {n: a.view(f"u{a.dtype.itemsize}") if n in other else a for n, a in arrays.items()}
        record = self._record() | {"arrays": sorted(plain), "dtypes": other}
        record = json.dumps(record, sort_keys=True)
        atomic_npz(self.path, {_RECORD: np.array(record), **plain})


def part_fingerprints(parts: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint of each part; of a part that is a mapping with names, of each entry."""
    return {
        name: {key: fingerprint(item) for key, item in part.items()}
        if isinstance(part, dict) and part and all(isinstance(key, str) for key in part)
        else fingerprint(part)
        for name, part in parts.items()
    }


def require_same_parts(
    path: pathlib.Path, record: Mapping[str, Any], parts: Mapping[str, Any]
) -> None:
    """Refuses what was made for other parts than these, or in another format."""
    if record.get("format") != FORMAT:
        raise mismatch_error(path, ["format (it is of another version of this library)"])
    if record.get("parts") != parts:
        raise mismatch_error(path, differences(record.get("parts", {}), parts))


def mismatch_error(path: pathlib.Path, differ: Sequence[str]) -> ValueError:
    """Return the error of a store that was made for other inputs."""
    said = ", ".join(differ)
    said = said if len(said) < 160 else f"{said[:160]}..."
    return ValueError(
        f"{path} was made for something else: it differs in {said}; give another path, or start "
        "over with restart=True (--restart of a study)"
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The names of what differs, and of mappings in brackets of which entries."""
    differ = []
    for name in sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)):
        one, other = a.get(name), b.get(name)
        nested = isinstance(one, dict) and isinstance(other, dict)
        differ.append(f"{name} ({', '.join(differences(one, other))})" if nested else name)
    return differ
