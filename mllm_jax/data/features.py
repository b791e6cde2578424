"""Vision features of a data set, computed once and kept: the tower is frozen."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import tqdm

from mllm_jax.data.processor import Processor
from mllm_jax.interventions.tap import Taps
from mllm_jax.sharding import hosts, mesh
from mllm_jax.workdir import atomic_json, read_json


@jax.jit
def encode(model, batch) -> jax.Array:
    """float[I, P, E]: what the vision tower gives for the pictures of a batch."""
    return model.features(batch, Taps())


def by_row(config, batch, values) -> np.ndarray:
    """float32[B, W]: of each row's pictures, the mean of their tiles' values float[I, W].

    A row without a picture is 0.
    """
    weight = (config.readers(batch) & batch.real).astype(np.float64)
    total = weight @ np.asarray(values, np.float64)
    return (total / np.maximum(weight.sum(1, keepdims=True), 1)).astype(np.float32)


def places(config, batch) -> np.ndarray:
    """int[B]: which of a batch's pictures each row reads; a picture that is given twice is one."""
    each = config.tiles * config.image_tokens
    first = np.where(batch.image_at >= 0, batch.image_at, 2**30).min(-1)
    return np.minimum(first // each, len(batch.real) // config.tiles - 1)  # empty rows: any


def vision_features(
    model,
    processor: Processor,
    examples: Sequence,
    path: str | pathlib.Path,
    *,
    batch_size: int = 8,
    label: str = "vision features",
) -> np.ndarray:
    """float32[N, P, E]: what the vision tower gives for each example, in a mapped file.

    P counts the patches of all places that a picture has for tiles.

    A killed run continues where it stopped.

    Args:
      examples: each with an `image`.
      path: the .npy file; beside it a .json says how much of it is done.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = path.with_suffix(".json")
    vision = model.config.vision
    tokens = model.config.tiles * vision.feature_tokens
    shape = (len(examples), tokens, vision.width)
    done = read_json(progress)["done"] if progress.exists() and path.exists() else 0
    done = hosts.agree(done)
    kept = None
    if hosts.writes():
        mode = "r+" if done else "w+"
        kept = np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=shape)
    with (
        mesh.on(model),
        tqdm.tqdm(total=len(examples), initial=done, desc=label, leave=False) as bar,
    ):
        size = mesh.filled("B", batch_size)
        while done < len(examples):
            some = [examples[i] for i in range(done, min(done + size, len(examples)))]
            batch = processor([e.image for e in some], ["<image>"] * len(some), rows=size)
            values = mesh.home(encode(model, mesh.place(batch.replace(processor=None))))
            if kept is not None:
                values = np.asarray(values).reshape(-1, *shape[1:])
                kept[done : done + len(some)] = values[places(model.config, batch)[: len(some)]]
                kept.flush()
            done += len(some)
            atomic_json(progress, {"done": done})
            bar.update(len(some))
    hosts.meet(str(path))
    return np.load(path, mmap_mode="r")
