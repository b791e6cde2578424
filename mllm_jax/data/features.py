"""Vision features of a data set, computed once and stored for a frozen vision tower."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.data.domains import Example
from mllm_jax.interventions import binding
from mllm_jax.interventions.edits import BoundEdit, Edits
from mllm_jax.interventions.tap import Taps
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.passes import run
from mllm_jax.processors.processor import Processor
from mllm_jax.sharding import mesh
from mllm_jax.store import RowStore
from mllm_jax.typing import Array, Float


def read_pictures(
    model: MultimodalModel, batch: Batch, edits: Edits | None = None
) -> tuple[Batch, Edits]:
    """Return a batch with its vision features, and the edits for the passes that read it.

    These passes skip the vision tower; the effect of its edits is contained in the features.

    Args:
      model: The model.
      batch: The batch, with pixels.
      edits: Edits of any site.
    """
    of_vision, others = Edits(), Edits()
    for edit in edits or ():
        if edit.address.site.module == "vision":
            of_vision >>= Edits((edit,))
        else:
            others >>= Edits((edit,))
    batch = run.unshare_patched(model, batch, of_vision)
    bare = batch.replace(processor=None)
    bound, _ = binding.bind(model, bare, of_vision, None, "none")
    with mesh.use_mesh_of(model):
        features = encode_pictures(model, mesh.shard_batch(bare), run.shard_edits(bound))
        return batch.replace(features=mesh.gather_to_host(features)), others


@jax.jit
def encode_pictures(
    model: MultimodalModel, batch: Batch, edits: tuple[BoundEdit, ...] = ()
) -> Float[Array, "I P E"]:
    """Return the vision tower's features of the pictures of a batch."""
    return model.features(batch, Taps(edits))


def mean_over_tiles(config: MultimodalConfig, batch: Batch, values: Any) -> np.ndarray:
    """Return the mean value of the tiles that each row reads.

    Args:
      config: The model's config.
      batch: The batch.
      values: float[I, W], of each tile.

    Returns:
      float32[B, W], 0 for a row without a picture.
    """
    weight = np.asarray(config.readers(batch) & batch.is_real_tile, np.float64)
    total = weight @ np.asarray(values, np.float64)
    return (total / np.maximum(weight.sum(1, keepdims=True), 1)).astype(np.float32)


def picture_sizes(
    config: MultimodalConfig, examples: Sequence[Example]
) -> list[tuple[int, int]] | None:
    """Return the (height, width) of each picture if a processor needs it besides features."""
    if not config.depends_on_size:
        return None
    return [example.image.size[::-1] for example in examples]  # PIL gives the width first


def picture_indices(config: MultimodalConfig, batch: Batch) -> np.ndarray:
    """Return int[B], which of a batch's pictures each row reads.

    Rows that share a picture have the same index; a row without a picture has an arbitrary one.
    """
    tiles = int(np.max(batch.tile)) + 1  # of the pictures of a row
    each = tiles * config.tile_tokens(batch)
    first = np.where(batch.image_token_index >= 0, batch.image_token_index, 2**30).min(-1)
    return np.minimum(first // each, len(batch.is_real_tile) // tiles - 1)


def vision_features(
    model: MultimodalModel,
    processor: Processor,
    examples: Sequence[Example],
    path: str | pathlib.Path,
    *,
    batch_size: int = 8,
    restart: bool = False,
    label: str = "vision features",
) -> np.ndarray:
    """Return the vision tower's features of each example, stored in a mapped file.

    A killed run continues where it stopped; examples may be added at the end. The pictures are read
    each time, to compare them with those of the file, and the tower runs only for new ones.

    Args:
      model: The model.
      processor: Its processor.
      examples: The examples, each with an `image`, and `encoded` if its bytes are at hand.
      path: The .npy file; a .json beside it records the number of finished pictures and what the
        features depend on.
      batch_size: The number of pictures that the tower reads at one time.
      restart: Whether to remove an existing file.
      label: The name on the progress bar.

    Returns:
      float32[N, P, E]; P counts the patches of all tiles that a picture can have. Pictures at their
      native resolution are padded to the largest.

    Raises:
      ValueError: The file is damaged, or holds features of another model, processor or other
        pictures, or of more pictures.
    """
    path = pathlib.Path(path)
    config = model.config
    places = processor.feature_places(picture_sizes(config, examples) or [])
    # At native resolution, a larger picture makes all rows longer.
    own = {"places": places} if config.depends_on_size else {}
    store = RowStore(
        path.with_suffix(".json"), lambda _: path, len(examples), restart=restart,
        model=[config, model.vision], processor=processor.picture_settings(), **own,
    )  # fmt: skip
    store.resume(map(picture_content, examples))
    with (
        mesh.use_mesh_of(model),
        tqdm.tqdm(total=len(examples), initial=store.done, desc=label, leave=False) as bar,
    ):
        size = mesh.round_up_to_shards("B", batch_size)
        while store.done < len(examples):
            chunk = [examples[i] for i in range(len(examples))[store.done : store.done + size]]
            batch = processor([e.image for e in chunk], ["<image>"] * len(chunk), rows=size)
            values = mesh.gather_to_host(
                encode_pictures(model, mesh.shard_batch(batch.replace(processor=None)))
            )
            values = np.asarray(values, np.float32)
            values = values.reshape(
                len(values) // (int(batch.tile.max()) + 1), -1, values.shape[-1]
            )
            values = values[:, :places]  # a batch may have more places than its pictures need
            values = np.pad(values, ((0, 0), (0, places - values.shape[1]), (0, 0)))
            values = values[picture_indices(config, batch)[: len(chunk)]]
            store.append([picture_content(e) for e in chunk], {"features": values})
            bar.update(len(chunk))
    return store.arrays()["features"]


def features_batch(
    processor: Processor,
    examples: Sequence[Example],
    features: np.ndarray,
    *,
    rows: int | None = None,
) -> Batch:
    """Return a batch of stored features of pictures, one per row, with no text in the prompts.

    Args:
      processor: The processor of the model.
      examples: The examples of the features.
      features: float[N, P, E], see `vision_features`.
      rows: The number of rows to which empty rows pad the batch.
    """
    sizes = picture_sizes(processor.config, examples)
    prompts = ["<image>"] * len(examples)
    return processor(None, prompts, features=np.asarray(features), sizes=sizes, rows=rows)


def is_patch(model: MultimodalModel, batch: Batch) -> np.ndarray:
    """Return which of a batch's features are of patches, bool[I, P]: not CLS and not padding."""
    assert batch.features is not None
    kind = np.asarray(model.token_maps(batch)["vision"].kind)
    return kind[:, -batch.features.shape[1] :] == tokens.CODE["image"]  # CLS comes before


def picture_content(example: Example) -> Any:
    """Return the content of an example's picture: the bytes of its file, or the picture."""
    return getattr(example, "encoded", None) or example.image
