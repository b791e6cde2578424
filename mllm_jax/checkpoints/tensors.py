"""The tensors of a checkpoint: opened by canonical key and not yet read, written whole or not."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import safetensors

from mllm_jax import store
from mllm_jax.checkpoints import tables, torch_file
from mllm_jax.checkpoints.stored import Stored, row_major

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first there is, whole or in shards
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


def has_weights(directory: pathlib.Path) -> bool:
    """Whether `open_directory` finds anything to open."""
    return any((directory / f"{n}{end}").exists() for n in WEIGHTS for end in ("", ".index.json"))


def open_directory(directory: pathlib.Path, problems: list[Exception]) -> dict[str, Stored | None]:
    """The tensors of a checkpoint: safetensors or else PyTorch files, whole or in shards.

    Args:
        directory: of the checkpoint.
        problems: what is wrong with its files is added here, one error each.

    Returns:
        Canonical key -> tensor, not yet read; None where the index names it and its shard does not
        have it, which is among the problems.

    Raises:
        FileNotFoundError: there are no such files.
    """
    for name in WEIGHTS:
        if (directory / name).exists():
            opened = _open_files([directory / name], problems)
            return by_name(itertools.chain(*opened.values()), problems)
        if (index := directory / f"{name}.index.json").exists():
            return _open_shards(index, problems)
    raise FileNotFoundError(
        f"{directory}: has neither {' nor '.join(WEIGHTS)}, nor an index of shards of it"
    )


def open_file(path: pathlib.Path) -> list[Stored]:
    """The tensors of a `.safetensors` file, or of any other that `torch.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short, or holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; fetch it again")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def by_name(tensors: Iterable[Stored], problems: list[Exception]) -> dict[str, Stored]:
    """Canonical key -> tensor; one that is there twice is added to the problems."""
    found: dict[str, Stored] = {}
    for tensor in tensors:
        first = found.setdefault(tables.canonical(tensor.key), tensor)
        if first is not tensor:
            place = "" if first.path == tensor.path else f" of {first.path.name}"
            problems.append(
                ValueError(
                    f"{tensor.path}: {tensor.key!r} and {first.key!r}{place} are the same tensor"
                )
            )
    return found


def _open_files(
    paths: Iterable[pathlib.Path], problems: list[Exception]
) -> dict[pathlib.Path, list[Stored]]:
    """The tensors of each file that can be opened; why another cannot is added to the problems."""
    opened = {}
    for path in paths:
        try:
            opened[path] = open_file(path)
        except (OSError, ValueError) as error:
            problems.append(error)
    return opened


def _open_shards(index: pathlib.Path, problems: list[Exception]) -> dict[str, Stored | None]:
    try:
        places = {
            key: index.parent / pathlib.PurePath(shard).name
            for key, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        problems.append(ValueError(f"{index}: not a readable index; fetch it again"))
        return {}
    opened = _open_files(sorted(set(places.values())), problems)
    for shard, tensors in opened.items():
        keys = {tensor.key for tensor in tensors}
        absent = [key for key, place in places.items() if place == shard and key not in keys]
        if absent:
            named = ", ".join(tables.brief(absent))
            problems.append(ValueError(f"{index}: names tensors that {shard.name} lacks: {named}"))
    lost = dict.fromkeys(map(tables.canonical, places))
    return lost | by_name(itertools.chain(*opened.values()), problems)


def _open_safetensors(path: pathlib.Path) -> list[Stored]:
    try:
        with safetensors.safe_open(path, "numpy"):  # finds whatever is wrong with its layout
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or altered ({error}); fetch it again") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    if unknown := {entry["dtype"] for entry in header.values()} - set(_DTYPES):
        raise ValueError(f"{path}: tensors of {', '.join(sorted(unknown))} are not read")
    tensors = []
    for key, entry in header.items():
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start = 8 + size + entry["data_offsets"][0]
        tensors.append(Stored(path, key, dtype, shape, start, row_major(shape, dtype)))
    return tensors


def _open_torch(path: pathlib.Path) -> list[Stored]:
    value = torch_file.index(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not tensors by name")
    if other := [key for key, tensor in value.items() if not isinstance(tensor, Stored)]:
        raise ValueError(f"{path}: not a tensor: {', '.join(map(str, other))}")
    return [tensor._replace(key=str(key)) for key, tensor in value.items()]


def write(tensors: Mapping[str, np.typing.ArrayLike], path: pathlib.Path) -> None:
    """Writes a safetensors file, which appears complete or not at all.

    Args:
        tensors: by key. Each has a shape and a dtype, and becomes an array when its turn comes.
        path: the file; replaced when it exists.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    keys = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)  # so that all are aligned
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
