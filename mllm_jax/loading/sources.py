"""Where the parts of a checkpoint lie: its folder, the hub, its tower, the base of an adapter."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import huggingface_hub

from mllm_jax import families, files
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints import tensors as tensors_
from mllm_jax.checkpoints.stored import LazyTensor, Stored
from mllm_jax.families.base import Family
from mllm_jax.loading import adapters, embedded
from mllm_jax.models.multimodal import MultimodalConfig

_HUB_SETTINGS = ["*.json", "*.jinja", "*.model"]
_HUB_WEIGHTS = ["*.safetensors"]
_HUB_PICKLES = [  # where there are no safetensors, or not of all that an adapter has
    "pytorch_model*.bin", "adapter_model.bin", adapters.BESIDE,
    *(layout.projector_file for layout in families.ORIGINAL_LAYOUTS),
]  # fmt: skip
CONFIG = ("config.json",)
TOKENS = ("tokenizer.json", "tokenizer.model")


def locate(name: str | os.PathLike, *, weights: bool = True) -> pathlib.Path:
    """The directory of a checkpoint, made or fetched if need be; see `load`.

    Args:
        name: as `load` has it.
        weights: whether they are fetched too, or the settings alone.
    """
    if name == "embedded":
        return embedded.directory()
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        found = _fetch(name, _HUB_WEIGHTS if weights else [])
        if weights and (adapters.is_adapter(found) or not any(found.glob("*.safetensors"))):
            found = _fetch(name, _HUB_PICKLES)
    except (OSError, ValueError) as error:  # offline, no such name, not a name at all
        first, *_ = str(error).splitlines() or [""]
        raise FileNotFoundError(
            f"'{files.line(os.fspath(name), 120)}' is neither a directory nor to be had from the "
            f"hub: {files.line(first, 180)}"
        ) from error
    return found


def _fetch(name: str | os.PathLike, more: list[str]) -> pathlib.Path:
    patterns = [*_HUB_SETTINGS, *more]
    return pathlib.Path(huggingface_hub.snapshot_download(os.fspath(name), allow_patterns=patterns))


def read_config(directory: pathlib.Path) -> MultimodalConfig:
    """Reads `config.json` of a checkpoint directory."""
    path, fields = directory / "config.json", read_fields(directory)
    if original := families.original_layout(fields):
        tower = part(path, fields, original.tower_field, weights=False)
        fields = original.to_hf(fields, read_fields(tower), path)
    return families.from_hf(fields, path)


def read_fields(directory: pathlib.Path) -> dict[str, Any]:
    """The fields of `config.json` of a checkpoint directory."""
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(files.refusal(path, ["missing, so this is not a checkpoint"]))
    return files.read_json(path)


def part(
    config: pathlib.Path, fields: Mapping[str, Any], field: str, *, weights: bool
) -> pathlib.Path:
    """The directory of another checkpoint that a config names, seen from there or as in `load`."""
    problems: list[str] = []
    name = schema.values(fields, {field: (schema.NAME, None)}, "", problems)[field]
    if name is None:
        problems = problems or [f"{field} is missing"]
        raise ValueError(files.refusal(config, problems))
    near = config.parent / name
    if near.is_dir():
        return near
    try:
        return locate(name, weights=weights)
    except FileNotFoundError as error:
        reason = files.line(f"{field}: {error}", 150)
        raise FileNotFoundError(
            files.refusal(config, [f"{reason}; it may be a local directory"])
        ) from error


def base_of(
    directory: pathlib.Path, base: str | os.PathLike | None, *, weights: bool
) -> pathlib.Path:
    """The directory of the whole model: that which an adapter changes, or the checkpoint itself."""
    if not adapters.is_adapter(directory):
        if base is not None:
            problem = f"base= is for a folder with {adapters.CONFIG}, and there is none"
            raise ValueError(files.refusal(directory, [problem]))
        return directory
    if base is not None:
        return locate(base, weights=weights)
    fields = adapters.read_fields(directory)
    return part(directory / adapters.CONFIG, fields, adapters.BASE, weights=weights)


def holder(
    directory: pathlib.Path, base: str | os.PathLike | None, names: tuple[str, ...]
) -> pathlib.Path:
    """Where one of these files is: with an adapter, or else with the model that it changes."""
    if any((directory / name).exists() for name in names) or not adapters.is_adapter(directory):
        return directory
    return base_of(directory, base, weights=False)


def open_tensors(
    directory: pathlib.Path,
    settings: pathlib.Path,
    base: str | os.PathLike | None,
    family: Family,
    problems: list[Exception],
) -> Mapping[str, LazyTensor | None]:
    """The tensors of a checkpoint, from all places it keeps them in.

    Args:
        directory: of the checkpoint.
        settings: where its `config.json` is.
        base: of an adapter, see `base_of`.
        family: of the model.
        problems: what is wrong with the files is added here.

    Returns:
        Canonical key -> tensor, not yet read. None at all where a file without an index cannot be
        opened: nobody knows what is missing then.
    """
    whole = base_of(directory, base, weights=True)
    found = _open_whole(whole, settings, family, problems)
    if whole == directory or not found:
        return found
    return adapters.merge(found, directory, problems, family.canonical_key)


def _open_whole(
    directory: pathlib.Path, settings: pathlib.Path, family: Family, problems: list[Exception]
) -> Mapping[str, Stored | None]:
    """The tensors of a whole model, of which the config may lie elsewhere."""
    fields = read_fields(settings)
    original = families.original_layout(fields)
    if original is None:
        return tensors_.open_directory(directory, problems, family.canonical_key)
    config = settings / "config.json"
    projector_alone = (directory / original.projector_file).exists() and not tensors_.has_weights(
        directory
    )
    if projector_alone:
        base = part(config, fields, original.base_field, weights=True)
        found = tensors_.open_directory(base, problems, family.canonical_key)
        found = {key: tensor for key, tensor in found.items() if not family.is_projector(key)}
    else:
        found = tensors_.open_directory(directory, problems, family.canonical_key)
    if any(key.startswith("vision_tower.") for key in found):
        return found
    tower = part(config, fields, original.tower_field, weights=True)
    theirs = tensors_.open_directory(tower, problems, family.canonical_key)
    named = {name: t for key, t in theirs.items() if (name := original.tower_key(key))}
    return {**found, **named} if found and named else {}
