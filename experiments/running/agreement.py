"""The state that all processes of a run must share: the config, and the content of its files."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

CHECKPOINTS = "model", "clip"  # fields of a config that name a checkpoint
FILES = "projector", "masks", "vqa.manual"  # fields that name a file or a folder
_PACKAGES = "mllm_jax", "experiments"
_LIBRARIES = "jax", "jaxlib", "flax", "numpy", "optax", "transformers"


def parts(config: Any) -> dict[str, Any]:
    """Return the values that must be equal in all processes, by name, as plain JSON values."""
    return {
        "config": json.loads(json.dumps(config.to_dict(), default=str)),
        "content": _contents(config),
        **made_by(),
    }


def made_by() -> dict[str, dict[str, str]]:
    """Return the digests of our code, and the versions of the libraries it uses."""
    return {
        "code": {name: digest(_package_folder(name)) for name in _PACKAGES},
        "version": {"Python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def files(config: Any) -> dict[str, str]:
    """Return the digests of the files that a config names, except its model and its pictures."""
    from mllm_jax.loading import sources

    names = {name: at(config, name) for name in FILES if name != "vqa.manual"}
    # FOLDER/{module}.pth stands for all files of the folder.
    paths = {n: pathlib.Path(str(path).split("{")[0]).expanduser() for n, path in names.items()}
    digests = {name: digest(path) for name, path in paths.items() if names[name] and path.exists()}
    if config.get("clip"):
        digests["clip"] = digest(sources.locate(config.clip))
    return digests


def at(config: Any, field: str) -> Any:
    """Return a nested field such as `proj.batch_size`; None if the config has no such field."""
    for name in field.split("."):
        config = config.get(name) if config else None
    return config


def digest(path: pathlib.Path) -> str:
    """Return the digest of a file, or of the names and contents of all files in a folder."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
        if file.is_file() and "__pycache__" not in file.parts:
            with file.open("rb") as opened:
                own = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(json.dumps([str(file.relative_to(path)), own]).encode())
    return total.hexdigest()[:16]


def _contents(config: Any) -> dict[str, str]:
    """Return the digests of the checkpoints, files and folders that a config names."""
    from mllm_jax.loading import sources

    names = {name: at(config, name) for name in FILES}
    names |= {f"paths[{i}]": path for i, path in enumerate(config.get("paths") or ())}
    paths = {name: pathlib.Path(path).expanduser() for name, path in names.items() if path}
    paths = {name: path for name, path in paths.items() if path.exists()}
    paths |= {name: sources.locate(config.get(name)) for name in CHECKPOINTS if config.get(name)}
    return {name: digest(path) for name, path in paths.items()}


def _package_folder(package: str) -> pathlib.Path:
    return pathlib.Path(importlib.import_module(package).__path__[0])
