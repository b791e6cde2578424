"""What all processes of a run have in common: its config, and the content of code and files."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

CHECKPOINTS = "model", "clip"  # fields of a config that name a checkpoint
FILES = "projector", "masks", "vqa.manual"  # and those that name a file or folder
_PACKAGES = "mllm_jax", "experiments"
_LIBRARIES = "jax", "jaxlib", "flax", "numpy", "optax", "transformers"


def parts(config) -> dict[str, Any]:
    """By name, what has to be the same in every process, as plain JSON values."""
    return {
        "config": json.loads(json.dumps(config.to_dict(), default=str)),
        "content": _contents(config),
        **made_by(),
    }


def made_by() -> dict[str, dict[str, str]]:
    """Digests of our code, and versions of what it stands on."""
    return {
        "code": {name: digest(_folder(name)) for name in _PACKAGES},
        "version": {"Python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def files(config) -> dict[str, str]:
    """Digests of what a config names beside its model and its pictures."""
    from mllm_jax.loading import load

    named = {name: at(config, name) for name in FILES if name != "vqa.manual"}
    # FOLDER/{module}.pth stands for all that is in the folder.
    there = {n: pathlib.Path(str(path).split("{")[0]).expanduser() for n, path in named.items()}
    found = {name: digest(path) for name, path in there.items() if named[name] and path.exists()}
    if config.get("clip"):
        found["clip"] = digest(load.locate(config.clip))
    return found


def at(config, field: str) -> Any:
    """A field inside of others, `proj.batch_size`; None where the config has none."""
    for name in field.split("."):
        config = config.get(name) if config else None
    return config


def digest(path: pathlib.Path) -> str:
    """Of the content of a file, or of the names and contents of all files in a folder."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
        if file.is_file() and "__pycache__" not in file.parts:
            with file.open("rb") as opened:
                own = hashlib.file_digest(opened, "sha256").hexdigest()
            found.update(json.dumps([str(file.relative_to(path)), own]).encode())
    return found.hexdigest()[:16]


def _contents(config) -> dict[str, str]:
    """Digests of the checkpoints, files and folders that a config names."""
    from mllm_jax.loading import load

    named = {name: at(config, name) for name in FILES}
    named |= {f"paths[{i}]": path for i, path in enumerate(config.get("paths") or ())}
    there = {name: pathlib.Path(path).expanduser() for name, path in named.items() if path}
    there = {name: path for name, path in there.items() if path.exists()}
    there |= {name: load.locate(config.get(name)) for name in CHECKPOINTS if config.get(name)}
    return {name: digest(path) for name, path in there.items()}


def _folder(package: str) -> pathlib.Path:
    return pathlib.Path(importlib.import_module(package).__file__).parent
