"""Describes a model without loading its weights: sites, parameters, bytes, neurons.

    python -m experiments.describe --model=llava-1.5-7b
    python -m experiments.describe --model=DIR --json=FILE

The model is a released one by name, a checkpoint directory, or a hub id, of which the settings
alone are fetched. Sites have the shapes of a batch of one row: one picture, as large as one can
be, and 32 more tokens.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from mllm_jax import families, sites, store
from mllm_jax.batch import Batch
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.loading import load
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.planning import programs
from mllm_jax.report import tables

MODEL = flags.DEFINE_string("model", None, "A released model, a checkpoint directory, or a hub id.")
JSON = flags.DEFINE_string("json", None, "A file to write the same to.")
DTYPES = ("float32", "bfloat16")
WORDS = 32


def find(name: str) -> MultimodalConfig:
    """The config of a model.

    Raises:
        FileNotFoundError, ValueError: nothing has this name, and the message lists the nearest
            released models; or the config is not that of a model we have.
    """
    if name in families.RELEASED:
        return families.RELEASED[name]()
    near = ", ".join(families.nearest(name))
    if "/" not in name and not pathlib.Path(name).is_dir():
        raise ValueError(
            f"{name!r} is neither a released model nor a directory nor a hub id; nearest: {near}"
        )
    try:
        directory = load.locate(name, weights=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; nearest of the released models: {near}") from error
    return load.read_config(directory)


def describe(config: MultimodalConfig) -> dict[str, Any]:
    """What a model has, found by shape alone.

    Args:
        config: of the model.

    Returns:
        `config`; `parameters` and `bytes` by module and in all, `bytes` by dtype; `neurons`: the
        sites of neurons with `layers` (L) and `width` (F); `sites` in the order of a pass, each
        with `axes` in letters and `shape` in numbers.
    """
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    counts = dict.fromkeys((site.module for site in sites.TABLE), 0)  # in the order of a pass
    for (module, *_), param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        counts[module] = counts.get(module, 0) + math.prod(param.shape)
    parameters = {module: count for module, count in counts.items() if count}
    parameters["all"] = sum(parameters.values())
    found = site_shapes(model, batch(config))
    described, neurons = [], {}
    for site in sites.TABLE:
        if site.name not in found:
            continue
        layers, shape = found[site.name].layers, tuple(found[site.name].shape)
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


def batch(config: MultimodalConfig) -> Batch:
    """A batch of one row without content: its largest picture, and WORDS more tokens."""
    return programs.abstract_batch(config, programs.Size(rows=1, words=WORDS), multiple=1)


def page(name: str, found: dict[str, Any]) -> str:
    """The description as text."""
    parameters, sizes = found["parameters"], found["bytes"]
    by_module = [
        (module, f"{count:,}", *(_size(sizes[dtype][module]) for dtype in DTYPES))
        for module, count in parameters.items()
    ]
    neurons = [
        (site, f"{n['layers']} x {n['width']}", f"{n['layers'] * n['width']:,}")
        for site, n in found["neurons"].items()
    ]
    shapes = [
        (site["name"], " ".join(site["axes"]), " x ".join(map(str, site["shape"])), site["about"])
        for site in found["sites"]
    ]
    return "\n\n".join(
        [
            f"{name}: {parameters['all']:,} parameters",
            tables.markdown(("module", "parameters", *DTYPES), by_module),
            tables.markdown(("neurons", "L x F", "in all"), neurons),
            tables.markdown(("site", "axes", "shape", "what it is"), shapes),
        ]
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        found = describe(find(MODEL.value))
        print(page(MODEL.value, found))
        if JSON.value:
            store.atomic_json(pathlib.Path(JSON.value), {"model": MODEL.value, **found})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("model")
    app.run(main)
