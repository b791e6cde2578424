"""Locate the parts of a checkpoint: its directory, the hub, its tower, the base of an adapter."""

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
_HUB_PICKLES = [  # fetched without safetensors, or for an adapter, which may use both formats
    "pytorch_model*.bin", "adapter_model.bin", adapters.TRAINED_WHOLE,
    *(layout.projector_file for layout in families.ORIGINAL_LAYOUTS),
]  # fmt: skip
CONFIG = ("config.json",)
TOKENS = ("tokenizer.json", "tokenizer.model")


def locate(name: str | os.PathLike, *, weights: bool = True) -> pathlib.Path:
    """Return the directory of a checkpoint, which is created or fetched if necessary.

    Args:
      name: As in `load`.
      weights: Whether to fetch the weights as well as the settings.

    Raises:
      FileNotFoundError: The name is not a directory, and the hub does not provide it.
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
    except (OSError, ValueError) as error:
        raise files.unavailable(os.fspath(name), error) from error
    return found


def _fetch(name: str | os.PathLike, more: list[str]) -> pathlib.Path:
    patterns = [*_HUB_SETTINGS, *more]
    return pathlib.Path(huggingface_hub.snapshot_download(os.fspath(name), allow_patterns=patterns))


def read_config(directory: pathlib.Path) -> MultimodalConfig:
    """Return the config of a checkpoint directory."""
    path, fields = directory / "config.json", read_fields(directory)
    if original := families.original_layout(fields):
        tower = named_directory(path, fields, original.tower_field, weights=False)
        fields = original.to_hf(fields, read_fields(tower), path)
    return families.from_hf(fields, path)


def read_fields(directory: pathlib.Path) -> dict[str, Any]:
    """Return the fields of the `config.json` of a checkpoint directory."""
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(files.refusal(path, ["missing, so this is not a checkpoint"]))
    return files.read_json(path)


def named_directory(
    config: pathlib.Path, fields: Mapping[str, Any], field: str, *, weights: bool
) -> pathlib.Path:
    """Return the directory of another checkpoint whose name is in a config.

    Args:
      config: The path of the config; the name may be a directory relative to it.
      fields: The fields of the config.
      field: The field with the name.
      weights: Whether to fetch the weights as well as the settings.

    Raises:
      ValueError: The config does not have the field, or its value is not a name.
      FileNotFoundError: There is no such checkpoint.
    """
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


def base_directory(
    directory: pathlib.Path, base: str | os.PathLike | None, *, weights: bool
) -> pathlib.Path:
    """Return the directory of the model that an adapter changes, or of the checkpoint itself."""
    if not adapters.is_adapter(directory):
        if base is not None:
            problem = f"base= needs a folder with {adapters.CONFIG}, which this one lacks"
            raise ValueError(files.refusal(directory, [problem]))
        return directory
    if base is not None:
        return locate(base, weights=weights)
    fields = adapters.read_fields(directory)
    return named_directory(directory / adapters.CONFIG, fields, adapters.BASE, weights=weights)


def directory_with(
    names: tuple[str, ...], directory: pathlib.Path, base: str | os.PathLike | None
) -> pathlib.Path:
    """Return the directory with one of these files: an adapter's, or that of its base model."""
    if any((directory / name).exists() for name in names) or not adapters.is_adapter(directory):
        return directory
    return base_directory(directory, base, weights=False)


def open_tensors(
    directory: pathlib.Path,
    settings: pathlib.Path,
    base: str | os.PathLike | None,
    family: Family,
    problems: list[Exception],
) -> Mapping[str, LazyTensor | None]:
    """Return the tensors of a checkpoint from all its files, by canonical key and not yet read.

    Args:
      directory: The directory of the checkpoint.
      settings: The directory with its `config.json`.
      base: The base model of an adapter, see `base_directory`.
      family: The family of the model.
      problems: A list to which the problems of the files are appended.

    Returns:
      The tensors by canonical key. Empty if a file without an index cannot be opened, because the
      missing keys are then unknown.
    """
    model_directory = base_directory(directory, base, weights=True)
    tensors = _open_model(model_directory, settings, family, problems)
    if model_directory == directory or not tensors:
        return tensors
    return adapters.merge(tensors, directory, problems, family.canonical_key)


def _open_model(
    directory: pathlib.Path, settings: pathlib.Path, family: Family, problems: list[Exception]
) -> Mapping[str, Stored | None]:
    """Return the tensors of a whole model, whose config may be in another directory."""
    fields = read_fields(settings)
    original = families.original_layout(fields)
    if original is None:
        return tensors_.open_directory(directory, problems, family.canonical_key)
    config = settings / "config.json"
    projector_alone = (directory / original.projector_file).exists() and not tensors_.has_weights(
        directory
    )
    if projector_alone:
        base = named_directory(config, fields, original.base_field, weights=True)
        found = tensors_.open_directory(base, problems, family.canonical_key)
        found = {key: tensor for key, tensor in found.items() if not family.is_projector(key)}
    else:
        found = tensors_.open_directory(directory, problems, family.canonical_key)
    if any(key.startswith("vision_tower.") for key in found):
        return found
    tower = named_directory(config, fields, original.tower_field, weights=True)
    theirs = tensors_.open_directory(tower, problems, family.canonical_key)
    named = {name: t for key, t in theirs.items() if (name := original.tower_key(key))}
    return {**found, **named} if found and named else {}
