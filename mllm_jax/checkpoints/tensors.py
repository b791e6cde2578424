"""Open the tensors of a checkpoint by canonical key without reading them, and write such files."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mllm_jax import files, store
from mllm_jax.checkpoints import keys as keys_
from mllm_jax.checkpoints import torch_file
from mllm_jax.checkpoints.stored import Stored, row_major

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists, or its shards
_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_BYTES = 16 * 2**20  # maximum of a safetensors file; a tensor takes about 100


def has_weights(directory: pathlib.Path) -> bool:
    """Return whether a directory contains files that `open_directory` opens."""
    return any((directory / f"{n}{end}").exists() for n in WEIGHTS for end in ("", ".index.json"))


def open_directory(
    directory: pathlib.Path, problems: list[Exception], canonical_key: Callable[[str], str] = str
) -> Mapping[str, Stored | None]:
    """Return the tensors of safetensors or PyTorch files, in one file or in shards.

    Args:
      directory: The directory of the checkpoint.
      problems: A list to which an error is appended for each problem of its files.
      canonical_key: Maps any spelling of a key to the canonical one; by default the identity.

    Returns:
      The tensors by canonical key, not read yet. None for a tensor that the index lists but its
      shard does not contain, which is also one of the problems.

    Raises:
      FileNotFoundError: There are no such files.
    """
    for name in WEIGHTS:
        if (directory / name).exists():
            opened = _open_files([directory / name], problems)
            return by_name(itertools.chain(*opened.values()), problems, canonical_key)
        if (index := directory / f"{name}.index.json").exists():
            return _open_shards(index, problems, canonical_key)
    names = " nor ".join(WEIGHTS)
    problem = f"has neither {names}, nor an index of shards of it"
    raise FileNotFoundError(files.refusal(directory, [problem]))


def open_file(path: pathlib.Path) -> list[Stored]:
    """Return the tensors of a `.safetensors` file, or of a file written by `torch.save`.

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It is not a regular file.
      ValueError: It is truncated, or contains something else.
    """
    path = files.regular(path)
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def by_name(
    tensors: Iterable[Stored], problems: list[Exception], canonical_key: Callable[[str], str] = str
) -> dict[str, Stored]:
    """Return tensors by canonical key; a second tensor of a key is appended to the problems."""
    found: dict[str, Stored] = {}
    for tensor in tensors:
        first = found.setdefault(canonical_key(tensor.key), tensor)
        if first is not tensor:
            place = "" if first.path == tensor.path else f" of {files.line(first.path.name, 60)}"
            one, other = files.line(tensor.key, 60), files.line(first.key, 60)
            problem = f"'{one}' and '{other}'{place} are the same tensor"
            problems.append(ValueError(files.refusal(tensor.path, [problem])))
    return found


def _open_files(
    paths: Iterable[pathlib.Path], problems: list[Exception]
) -> dict[pathlib.Path, list[Stored]]:
    """Return the tensors of each file that can be opened; append the errors of the others."""
    opened = {}
    for path in paths:
        try:
            opened[path] = open_file(path)
        except (OSError, ValueError) as error:
            problems.append(error)
    return opened


def _open_shards(
    index: pathlib.Path, problems: list[Exception], canonical_key: Callable[[str], str]
) -> dict[str, Stored | None]:
    try:
        places = _places(index)
    except (OSError, ValueError) as error:
        problems.append(error)
        return {}
    opened = _open_files(sorted(set(places.values())), problems)
    for shard, tensors in opened.items():
        keys = {tensor.key for tensor in tensors}
        absent = [key for key, place in places.items() if place == shard and key not in keys]
        if absent:
            lacks = f"names tensors that {files.line(shard.name, 60)} lacks"
            named = files.some(keys_.brief(absent))
            problems.append(ValueError(files.refusal(index, [f"{lacks}: {named}"])))
    lost = dict.fromkeys(map(canonical_key, places))
    return lost | by_name(itertools.chain(*opened.values()), problems, canonical_key)


def _places(index: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the shard of each key according to an index; shards are in its directory."""
    shards = files.read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(files.refusal(index, ["not a readable index, it has no weight_map"]))
    for key, name in shards.items():
        plain = isinstance(name, str) and name and pathlib.PurePath(name).name == name
        if not plain or "\0" in name:
            problem = f"not a readable index, {files.line(key, 60)} is in {files.shown(name)}"
            raise ValueError(files.refusal(index, [f"{problem}, expected a file beside it"]))
    return {key: index.parent / name for key, name in shards.items()}


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if it has none.

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It is not a regular file.
      ValueError: It is truncated, or its metadata are not strings by name.
    """
    metadata = _read_header(files.regular(path))[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _altered(path, "its metadata are not strings by name")
    return metadata


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the position of its tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_BYTES):
            raise _altered(path, f"a header of {length} bytes in a file of {size}")
        try:
            return files.parse_json(file.read(length), "its header"), 8 + length
        except ValueError as error:
            raise _altered(path, error) from error


def _open_safetensors(path: pathlib.Path) -> list[Stored]:
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    tensors = [_entry(path, key, entry, start) for key, entry in header.items()]
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.end)):
        if tensor.offset != start:
            raise _altered(path, f"{files.line(tensor.key, 60)} does not follow the one before")
        start = tensor.end
    if start != (size := path.stat().st_size):
        raise _altered(path, f"its tensors end at {start} and the file at {size}")
    return tensors


def _entry(path: pathlib.Path, key: str, entry: object, start: int) -> Stored:
    """Return a tensor from its header entry; `start` is the position of the first tensor."""
    name = files.line(key, 60)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _altered(path, f"{name} has no dtype, shape and data_offsets")
    kind, shape, ends = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        problem = f"{name} holds {files.shown(kind)}, only {', '.join(_DTYPES)} are read"
        mend = "save the model again in bfloat16, not quantised"
        raise ValueError(files.refusal(path, [f"{problem}; {mend}"]))
    for value in (shape, ends):
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise _altered(path, f"{name} has {files.shown(value)} for a shape or offsets")
    dtype = _DTYPES[kind]
    if len(ends) != 2 or ends[1] - ends[0] != math.prod(shape) * dtype.itemsize or len(shape) > 32:
        raise _altered(path, f"{name}: {kind} of {files.shown(shape)} at {files.shown(ends)}")
    tensor = Stored(path, key, dtype, tuple(shape), start + ends[0], row_major(shape, dtype))
    return tensor


def _altered(path: pathlib.Path, reason: object) -> ValueError:
    reason = files.line(reason, 150)
    return ValueError(files.refusal(path, [f"truncated or altered ({reason}); fetch it again"]))


def _open_torch(path: pathlib.Path) -> list[Stored]:
    value = torch_file.index(path)
    if not isinstance(value, dict):
        problem = f"holds a {type(value).__name__}, not tensors by name"
        raise ValueError(files.refusal(path, [problem]))
    tensors = [item for item in value.items() if isinstance(item[1], Stored)]
    if len(tensors) < len(value):
        other = [key for key, tensor in value.items() if not isinstance(tensor, Stored)]
        problem = f"not a tensor: {files.some(other)}"
        raise ValueError(files.refusal(path, [problem]))
    if other := [key for key in value if not isinstance(key, str)]:
        problem = f"not the name of a tensor: {files.some(other)}"
        raise ValueError(files.refusal(path, [problem]))
    return [tensor._replace(key=key) for key, tensor in tensors]


class Writable(Protocol):
    """An object that becomes an array when it is written; shape and dtype are known before."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array."""

    def __array__(self) -> np.ndarray: ...


def write(
    tensors: Mapping[str, Writable],
    path: pathlib.Path,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write a safetensors file atomically.

    Args:
      tensors: The tensors by key; each becomes an array only when it is written.
      path: The file; an existing one is replaced.
      metadata: Strings by name; by default those that transformers expects of a model's weights.

    Raises:
      OSError: The disk is full, or the directory is not writable.
    """
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    keys = sorted(
        tensors, key=lambda key: -tensors[key].dtype.itemsize
    )  # so that all tensors are aligned
    end = 0
    for key in keys:
        shape, dtype = tensors[key].shape, tensors[key].dtype
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with store.atomic(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for key in keys:
            file.write(np.ascontiguousarray(tensors[key]).reshape(-1).view(np.uint8))
