"""Vision features of a data set, computed once and kept: the tower is frozen."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from mllm_jax.interventions.tap import Taps
from mllm_jax.processors.processor import Processor
from mllm_jax.sharding import mesh
from mllm_jax.store import RowStore


@jax.jit
def encode_pictures(model, batch) -> jax.Array:
    """float[I, P, E]: what the vision tower gives for the pictures of a batch."""
    return model.features(batch, Taps())


def mean_over_tiles(config, batch, values) -> np.ndarray:
    """float32[B, W]: of each row's pictures, the mean of their tiles' values float[I, W].

    A row without a picture is 0.
    """
    weight = (config.readers(batch) & batch.is_real_tile).astype(np.float64)
    total = weight @ np.asarray(values, np.float64)
    return (total / np.maximum(weight.sum(1, keepdims=True), 1)).astype(np.float32)


def picture_indices(config, batch) -> np.ndarray:
    """int[B]: which of a batch's pictures each row reads; a picture that is given twice is one."""
    each = config.tiles * config.image_tokens
    first = np.where(batch.image_token_index >= 0, batch.image_token_index, 2**30).min(-1)
    return np.minimum(first // each, len(batch.is_real_tile) // config.tiles - 1)  # empty rows: any


def vision_features(
    model,
    processor: Processor,
    examples: Sequence,
    path: str | pathlib.Path,
    *,
    batch_size: int = 8,
    restart: bool = False,
    label: str = "vision features",
) -> np.ndarray:
    """float32[N, P, E]: what the vision tower gives for each example, in a mapped file.

    P counts the patches of all places that a picture has for tiles.

    A killed run continues where it stopped; examples may be added after these. The pictures are
    read each time, to compare them, and the tower runs for new ones alone.

    Args:
      examples: each with an `image`, and `encoded` if its bytes are at hand.
      path: the .npy file; beside it a .json says how much of it is done, and what it was made for.
      restart: remove what is there.

    Raises:
      ValueError: the file holds features of another model, processor or other pictures, of more
        pictures, or is damaged.
    """
    path = pathlib.Path(path)
    vision = model.config.vision
    tokens = model.config.tiles * vision.feature_tokens
    store = RowStore(
        path.with_suffix(".json"), lambda _: path, len(examples), restart=restart,
        model=[model.config, model.vision], processor=processor.picture_settings(),
    )  # fmt: skip
    store.resume(map(picture_content, examples))
    with (
        mesh.use_mesh_of(model),
        tqdm.tqdm(total=len(examples), initial=store.done, desc=label, leave=False) as bar,
    ):
        size = mesh.round_up_to_shards("B", batch_size)
        while store.done < len(examples):
            some = [examples[i] for i in range(len(examples))[store.done : store.done + size]]
            batch = processor([e.image for e in some], ["<image>"] * len(some), rows=size)
            values = mesh.gather_to_host(
                encode_pictures(model, mesh.shard_batch(batch.replace(processor=None)))
            )
            values = np.asarray(values, np.float32).reshape(-1, tokens, vision.width)
            values = values[picture_indices(model.config, batch)[: len(some)]]
            store.append([picture_content(e) for e in some], {"features": values})
            bar.update(len(some))
    return store.arrays()["features"]


def picture_content(example: Any) -> Any:
    """The content of an example's picture: the bytes of its file, or the picture."""
    return getattr(example, "encoded", None) or example.image
