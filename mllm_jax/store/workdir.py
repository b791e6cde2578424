"""The folder of a study, in which each step is computed once."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from mllm_jax.sharding import hosts
from mllm_jax.store import files
from mllm_jax.store.files import JOURNAL, atomic_json, damaged_error, parse_json_object, write
from mllm_jax.store.fingerprints import fingerprint
from mllm_jax.store.resumable import (
    FORMAT,
    Store,
    differences,
    part_fingerprints,
    require_same_parts,
)


class Workdir:
    """The folder of a study, which belongs to one config, model, data and code.

    Args:
      path: The folder; created if it is missing.
      config: The config of the study, as plain JSON values.
      restart: Whether to remove the files that a study wrote here before; other files are kept.

    Raises:
      ValueError: The folder belongs to another config.
    """

    def __init__(self, path: str | pathlib.Path, config: dict[str, Any], *, restart: bool = False):
        if not str(path).strip():
            raise ValueError("the name of the workdir is empty: give --workdir=FOLDER")
        self.path = pathlib.Path(path)
        self.config = json.loads(json.dumps(config))
        self.parts: dict[str, Any] = {}
        if hosts.is_primary():
            files.find_journal.cache_clear()
            files.read_journal.cache_clear()
            if restart:
                self._clear()
            self._begin()
        hosts.barrier("workdir")

    def _begin(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        config = self / "config.json"
        work = [p for p in self.path.iterdir() if p != config and not p.name.startswith(".")]
        if config.exists() and work:
            before = parse_json_object(config, config.read_text("utf-8", "replace"))
            if before != self.config:
                raise ValueError(
                    f"{self.path} belongs to another config (it differs in "
                    f"{', '.join(differences(before, self.config))}): choose another --workdir, "
                    "or start over with --restart"
                )
        elif (self / "made_for.json").exists():
            raise ValueError(
                f"{self.path} has the work of a study, but no config.json that says of which: "
                "choose another --workdir, or start over with --restart"
            )
        else:
            (self / JOURNAL).touch()
            atomic_json(config, self.config)

    def _clear(self) -> None:
        """Remove the files that the journal lists, and folders that are then empty."""
        journal = self / JOURNAL
        if not journal.exists():
            if (self / "config.json").exists():
                raise ValueError(
                    f"{self.path} has no list of the files of a study: remove it, or choose "
                    "another --workdir"
                )
            return
        for line in sorted(set(journal.read_text().splitlines())):
            path = self / line
            if not path.parent.resolve().is_relative_to(self.path.resolve()):
                continue
            if path.is_file() or path.is_symlink():
                path.unlink()
            elif line.endswith("/"):
                shutil.rmtree(path, ignore_errors=True)
            for folder in path.relative_to(self.path).parents[:-1]:
                with contextlib.suppress(OSError):  # it holds other files
                    (self.path / folder).rmdir()
        journal.unlink()

    def claim(self, **parts: Any) -> None:
        """Refuse to continue the work of another model, data, files or code.

        Call this once, before the first step.

        Args:
          **parts: The dependencies of the study, as in `Store`.

        Raises:
          ValueError: The folder belongs to other parts.
        """
        self.parts = part_fingerprints(parts)
        path = self / "made_for.json"
        if hosts.broadcast_from_primary(path.exists()):
            record = parse_json_object(path, path.read_text("utf-8", "replace"))
            require_same_parts(self.path, record, self.parts)
        else:
            atomic_json(path, {"format": FORMAT, "parts": self.parts})
            hosts.barrier("claim")

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    def arrays(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays of a step; compute and write them if they do not exist."""
        step = Store(self.path / "steps" / f"{name}.npz")
        step.parts = self.parts
        return self._step(name, step.read, lambda: step.write(make()))

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the JSON values of a step; compute and write them if they do not exist."""
        path = self.path / "steps" / f"{name}.json"

        def write():
            value = json.loads(json.dumps(make(), allow_nan=False))
            record = {"format": FORMAT, "parts": self.parts, "checksum": fingerprint(value)}
            atomic_json(path, record | {"value": value})

        def read():
            if not hosts.broadcast_from_primary(path.exists()):
                return None
            record = parse_json_object(path, path.read_text("utf-8", "replace"))
            require_same_parts(path, record, self.parts)
            if fingerprint(record.get("value")) != record.get("checksum"):
                raise damaged_error(path, "its values have changed")
            return record

        return self._step(name, read, write)["value"]

    def _step(self, name: str, read: Callable, write: Callable) -> Any:
        """Read a step; compute and write it first if it does not exist."""
        found = read()
        if found is None:
            write()
            hosts.barrier(name)
            if hosts.preemption_requested():
                hosts.exit_preempted(name)
            found = read()
        return found


def save_figure(workdir: Workdir, name: str, picture) -> str:
    """Write a PIL image into the figures, and return its path relative to the workdir.

    Args:
      workdir: The workdir of the study.
      name: The name of the file; `.jpg` takes a fraction of the space of `.png`, but loses detail.
      picture: The image.
    """
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG" if name.endswith(".jpg") else "PNG", quality=90)
    write(workdir / "figures" / name, encoded.getvalue())
    return f"figures/{name}"


def write_manifest(workdir: Workdir, **fields: Any) -> None:
    """Write `manifest.json`: config, versions, fingerprints of the claimed parts, and fields."""
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
            "processes": hosts.process_count(),
            **workdir.parts,
            **fields,
        },
    )
