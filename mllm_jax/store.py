"""Files: atomic writes, the user's cache, and the folder of a study with its steps.

A step writes one file; a killed study finds the files of its finished steps and continues, and
since every later step reads those files, it ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
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
    if not (hosts.writes() or path.is_relative_to(cache_directory())):
        with tempfile.TemporaryFile() as nowhere:
            yield nowhere
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; free some space and start again: "
            "what was finished is kept"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: str | pathlib.Path, content: str | bytes) -> None:
    """A whole file or none: bytes, or text in UTF-8."""
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def atomic_json(path: str | pathlib.Path, value: Any) -> None:
    """Sorted keys and no time in it: the same value is the same bytes."""
    write(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | pathlib.Path) -> Any:
    return json.loads(pathlib.Path(path).read_text())


def atomic_npz(path: str | pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic(path) as file:
        np.savez(file, **arrays)


def cache_directory() -> pathlib.Path:
    """The folder for files that can be made again: `MLLM_JAX_CACHE`, or the user's cache."""
    if own := os.environ.get("MLLM_JAX_CACHE"):
        return pathlib.Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "mllm_jax"


class Workdir:
    """A study's folder. It belongs to one config; another config is refused once work is in it.

    Args:
      path: made if it is missing.
      config: what the study was asked, as plain JSON values.
    """

    def __init__(self, path: str | pathlib.Path, config: dict[str, Any]):
        self.path = pathlib.Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.config = json.loads(json.dumps(config))
        asked = self.path / "config.json"
        if asked.exists() and len(list(self.path.iterdir())) > 1:
            before = read_json(asked)
            if before != self.config:
                raise ValueError(
                    f"{self.path} belongs to another config (it differs in "
                    f"{', '.join(_differences(before, self.config))}): choose another --workdir "
                    "or remove this one"
                )
        else:
            atomic_json(asked, self.config)

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    def arrays(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a step: read if it was done before, made and written if not."""
        with np.load(self._step(f"{name}.npz", make, atomic_npz), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """The plain values of a step, likewise."""
        return read_json(self._step(f"{name}.json", make, atomic_json))

    def _step(self, name: str, make: Callable, write: Callable) -> pathlib.Path:
        """The file of a step, there for all processes to read."""
        path = self.path / "steps" / name
        if not hosts.agree(path.exists()):
            write(path, make())
            hosts.meet(name)
            if hosts.leaving():
                hosts.leave(name)
        return path


def relative_picture(workdir: Workdir, name: str, picture) -> str:
    """Writes a PIL picture into the figures; its path as seen from the workdir."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    write(workdir / "figures" / name, encoded.getvalue())
    return f"figures/{name}"


def _differences(a: dict, b: dict) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def fingerprint(*trees: Any) -> str:
    """A short hash of arrays: which model, which data."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        for rows in mesh.rows(leaf):
            digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()[:16]


def structure(*trees: Any) -> str:
    """What is static in some pytrees, as text: functions by name, not by where they lie."""
    import jax

    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(trees)))


def manifest(workdir: Workdir, **fields: Any) -> None:
    """`manifest.json`: versions, fingerprints and whatever else made the result."""
    import importlib.metadata

    names = ("jax", "flax", "numpy", "optax", "transformers", "mllm-jax")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    atomic_json(
        workdir / "manifest.json",
        {
            "config": workdir.config,
            "versions": versions,
            "processes": hosts.count(),
            **fields,
        },
    )
