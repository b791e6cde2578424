"""Safetensors files: opened by canonical key and not yet read, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from mllm_jax.checkpoints import tables


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in an open file.

    Attributes:
        file: the open file. key: its name there.
        shape: known without reading it.
    """

    file: safetensors.safe_open
    key: str
    shape: tables.Shape

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.key)


def open_directory(directory: pathlib.Path, files: contextlib.ExitStack) -> dict[str, Stored]:
    """The tensors of a checkpoint, from `model.safetensors` or from its shards.

    Args:
        directory: of the checkpoint.
        files: closes them.

    Returns:
        Canonical key -> tensor, not yet read.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: a file is cut short, or holds a tensor twice.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return open_files([single], files)
    if not index.exists():
        pickled = any(directory.glob("*.bin"))
        hint = "; PyTorch .bin files are not read, save it as safetensors" if pickled else ""
        raise FileNotFoundError(f"{single}: missing{hint}")
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index}: not a readable index; fetch it again") from error
    return open_files([directory / shard for shard in sorted(shards)], files)


def open_files(paths: list[pathlib.Path], files: contextlib.ExitStack) -> dict[str, Stored]:
    """The tensors of some files; see `open_directory`."""
    stored: dict[str, Stored] = {}
    for path in paths:
        try:
            file = files.enter_context(safetensors.safe_open(path, "numpy"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: missing; fetch it again") from error
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: truncated or altered ({error}); fetch it again") from error
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name = tables.canonical(key)
            if name in stored:
                raise ValueError(f"{path}: {stored[name].key!r} and {key!r} are the same tensor")
            stored[name] = Stored(file, key, tuple(file.get_slice(key).get_shape()))
    return stored


def write(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes tensors to a file, which appears complete or not at all.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors.numpy.save_file(dict(tensors), partial, {"format": "pt"})
        os.replace(partial, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
