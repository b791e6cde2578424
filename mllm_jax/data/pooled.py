"""Features for probes: the mean of each picture at each site, taken inside the pass and stored."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from mllm_jax import sites, tokens
from mllm_jax.batch import Batch
from mllm_jax.data.domains import Example
from mllm_jax.data.features import (
    encode_pictures,
    features_batch,
    is_patch,
    mean_over_tiles,
    picture_content,
    picture_sizes,
)
from mllm_jax.interventions import captures
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.passes import run
from mllm_jax.processors.processor import Processor
from mllm_jax.sharding import mesh
from mllm_jax.store import RowStore

CAPTURES = {
    "projector": captures.mean(sites.projector.out, where=~tokens.cls),
    "lm.image": captures.mean(sites.lm.resid_post, where=tokens.image),
    "lm.last": captures.mean(sites.lm.resid_post, where=tokens.last),
}


def pooled_features(
    model: MultimodalModel,
    processor: Processor,
    examples: Sequence[Example],
    prompts: Sequence[str],
    path: str | pathlib.Path,
    *,
    features: np.ndarray | None = None,
    batch_size: int = 8,
    length: int | None = None,
    restart: bool = False,
    label: str = "pooled features",
) -> dict[str, np.ndarray]:
    """Return each picture's mean state on both sides of the projection and in each layer of the LM.

    Only means leave the pass: no tensor of images by tokens by width is ever stored. A killed run
    continues where it stopped.

    Args:
      model: The model.
      processor: Its processor.
      examples: The examples, each with an `image`.
      prompts: A prompt for each example. Image tokens precede the question, so that only `lm.last`
        depends on it (with a Q-Former, all but `vision` do).
      path: The folder of the arrays; it belongs to one model and processor, and to these pictures,
        prompts and features. Examples may be added at the end.
      features: float[N, P, E] of the examples, see `vision_features`, in place of running the
        tower.
      batch_size: The number of rows of a batch.
      length: The number of tokens of a row, so that all batches have one shape.
      restart: Whether to remove existing arrays.
      label: The name on the progress bar.

    Returns:
      Memory-mapped arrays: `vision` float32[N, E], before the projection, and `projector`
      float32[N, D], after it, means over the patches; `lm.image` float32[N, L, D], the output of
      each layer, mean over the image tokens; `lm.last` float32[N, L, D], the same at the last
      token.

    Raises:
      ValueError: The numbers of examples and prompts differ, or the folder holds features of
        something else, or is damaged.
    """
    if len(prompts) != len(examples) or not len(examples):
        raise ValueError(f"{len(examples)} examples for {len(prompts)} prompts")
    folder = pathlib.Path(path)
    store = RowStore(
        folder / "progress.json", lambda name: folder / f"{name}.npy", len(examples),
        restart=restart, model=model, processor=processor,
    )  # fmt: skip

    def item(i: int) -> tuple:
        """Return the dependencies of the arrays of an example."""
        row = None if features is None else np.asarray(features[i])
        return picture_content(examples[i]), prompts[i], row

    store.resume(map(item, range(len(examples))))
    with tqdm.tqdm(total=len(examples), initial=store.done, desc=label, leave=False) as bar:
        while store.done < len(examples):
            at = slice(store.done, store.done + batch_size)
            chunk = range(len(examples))[at]
            some = [examples[i] for i in chunk]
            inputs = _picture_arguments(model.config, some, features, at)
            batch = processor(prompts=prompts[at], rows=batch_size, length=length, **inputs)
            rows = _pooled(model, batch.replace(processor=None), len(some))
            store.append([item(i) for i in chunk], rows)
            bar.update(len(some))
    return store.arrays()


def _picture_arguments(
    config: MultimodalConfig, examples: list, features: np.ndarray | None, at: slice
) -> dict[str, Any]:
    """Return the processor's arguments for pictures: the pictures, or their features."""
    if features is None:
        return {"images": [example.image for example in examples]}
    sizes = picture_sizes(config, examples)
    return {"images": None, "features": np.asarray(features[at]), "sizes": sizes}


def projected_features(
    model: MultimodalModel,
    processor: Processor,
    examples: Sequence[Example],
    features: np.ndarray,
    *,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """Return each picture's mean features before and after the projection.

    Args:
      model: The model.
      processor: Its processor.
      examples: The examples, each with an `image`.
      features: float[N, P, E] of the examples, see `vision_features`.
      batch_size: The number of pictures that the projector reads at one time.

    Returns:
      `vision`, float32[N, E], and `projector`, float32[N, D]: means over patches and tokens.
    """
    parts = []
    for start in range(0, len(examples), batch_size):
        some = [examples[i] for i in range(len(examples))[start : start + batch_size]]
        rows = features[start : start + batch_size]
        batch = features_batch(processor, some, rows, rows=batch_size).replace(processor=None)
        capture = {"projector": CAPTURES["projector"]}
        projected = run.run(model, batch, None, capture, logits="none")["projector"]
        parts.append(
            {
                "vision": _mean_over_patches(model, batch)[: len(some)],
                "projector": np.asarray(projected, np.float32)[: len(some)],
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _mean_over_patches(model: MultimodalModel, batch: Batch) -> np.ndarray:
    """Return float32[B, E], the mean features of the patches of each row's picture."""
    features, real = np.asarray(batch.features), is_patch(model, batch)
    # The features of DeepStack come after those of the tower's last layer.
    width = features.shape[-1] // (1 + model.config.projector.deepstack)
    total = np.where(real[..., None], features[..., :width], 0).sum(1, dtype=np.float32)
    means = total / np.maximum(real.sum(1, keepdims=True), 1)
    return mean_over_tiles(model.config, batch, means)


def _pooled(model: MultimodalModel, batch: Batch, rows: int) -> dict[str, np.ndarray]:
    """Return the arrays of the first rows of a batch."""
    with mesh.use_mesh_of(model):
        features = mesh.gather_to_host(encode_pictures(model, mesh.shard_batch(batch)))
    batch = batch.replace(features=features)
    means = run.run(model, batch, None, CAPTURES, logits="none").captures
    arrays = {
        "vision": _mean_over_patches(model, batch),
        "projector": means["projector"],
        "lm.image": np.asarray(means["lm.image"]).swapaxes(0, 1),
        "lm.last": np.asarray(means["lm.last"]).swapaxes(0, 1),
    }
    return {name: np.asarray(values[:rows], np.float32) for name, values in arrays.items()}
