"""The description of a model, computed from the shapes of its config."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mllm_jax import families, sites, store
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.loading import sources
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.planning import programs
from mllm_jax.report import tables

DTYPES = ("float32", "bfloat16")
WORDS = 32  # tokens of a row besides its picture


def run(name: str, base: str | None, json: str | None) -> None:
    """Print the description of a model, and write it as JSON.

    Args:
      name: The name of the model, see `find`.
      base: The model that an adapter changes, see `find`.
      json: The path of the file to write; None writes no file.
    """
    description = describe(find(name, base))
    print(page(name, description))
    if json:
        store.atomic_json(pathlib.Path(json), {"model": name, **description})


def find(name: str, base: str | None = None) -> MultimodalConfig:
    """Return the config of a model.

    Args:
      name: A released model, a checkpoint directory or a hub id; also of an adapter.
      base: The model that an adapter changes; by default the one that the adapter names.

    Raises:
      FileNotFoundError, ValueError: There is no such model, and the message lists the nearest
        released models; or the config is not that of a supported model.
    """
    if name in families.RELEASED:
        return families.RELEASED[name]()
    nearest = ", ".join(families.nearest(name))
    if "/" not in name and not pathlib.Path(name).is_dir():
        raise ValueError(
            f"{name!r} is neither a released model nor a directory nor a hub id; nearest: {nearest}"
        )
    try:
        directory = sources.locate(name, weights=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; nearest of the released models: {nearest}") from error
    return sources.read_config(_config_folder(directory, base))


def _config_folder(directory: pathlib.Path, base: str | None) -> pathlib.Path:
    """Return the folder of `config.json`: the checkpoint itself, or the model of an adapter."""
    try:
        return sources.directory_with(sources.CONFIG, directory, base)
    except (FileNotFoundError, ValueError) as error:
        hint = "" if base else "; give the model that the adapter changes with --base"
        raise type(error)(f"{error}{hint}") from error


def describe(config: MultimodalConfig) -> dict[str, Any]:
    """Return the parameters, neurons and sites of a model, from shapes only.

    Args:
      config: The config of the model.

    Returns:
      `config`; `parameters`, and `bytes` by dtype, of each module and of all; `neurons`, the
      sites of neurons with `layers` (L) and `width` (F); `sites` in the order of a pass, each
      with its `axes` as letters and its `shape`.
    """
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    counts = dict.fromkeys((site.module for site in sites.TABLE), 0)  # in the order of a pass
    for (name, *_), param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        module = str(name)
        counts[module] = counts.get(module, 0) + math.prod(param.shape)
    parameters = {module: count for module, count in counts.items() if count}
    parameters["all"] = sum(parameters.values())
    batch = programs.abstract_batch(config, programs.Size(rows=1, words=WORDS), multiple=1)
    shapes = site_shapes(model, batch)
    described, neurons = [], {}
    for site in sites.TABLE:
        if site.name not in shapes:
            continue
        layers, shape = shapes[site.name].layers, tuple(shapes[site.name].shape)
        described.append(
            {
                "name": site.name,
                "axes": ["L", *site.axes] if site.stacked else list(site.axes),
                "shape": [layers, *shape] if site.stacked else list(shape),
                "about": site.about,
            }
        )
        if site.name.endswith(".act"):
            neurons[site.name] = {"layers": layers, "width": shape[-1]}
    return {
        "config": dataclasses.asdict(config),
        "parameters": parameters,
        "bytes": {
            dtype: {name: n * jnp.dtype(dtype).itemsize for name, n in parameters.items()}
            for dtype in DTYPES
        },
        "neurons": neurons,
        "sites": described,
    }


def page(name: str, description: dict[str, Any]) -> str:
    """Return a description as text."""
    parameters, sizes = description["parameters"], description["bytes"]
    by_module = [
        (module, f"{count:,}", *(_size(sizes[dtype][module]) for dtype in DTYPES))
        for module, count in parameters.items()
    ]
    neurons = [
        (site, f"{n['layers']} x {n['width']}", f"{n['layers'] * n['width']:,}")
        for site, n in description["neurons"].items()
    ]
    shapes = [
        (site["name"], " ".join(site["axes"]), " x ".join(map(str, site["shape"])), site["about"])
        for site in description["sites"]
    ]
    return "\n\n".join(
        [
            f"{name}: {parameters['all']:,} parameters",
            tables.markdown(("module", "parameters", *DTYPES), by_module),
            tables.markdown(("neurons", "L x F", "total"), neurons),
            tables.markdown(("site", "axes", "shape", "meaning"), shapes),
        ]
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
