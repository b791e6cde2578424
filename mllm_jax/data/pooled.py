"""Features for probes: one vector a picture and site, pooled inside the pass, and kept."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import tqdm

from mllm_jax import sites, tokens
from mllm_jax.data.features import encode_pictures, mean_over_tiles, picture_content
from mllm_jax.interventions import captures
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
    model,
    processor: Processor,
    examples: Sequence,
    prompts: Sequence[str],
    path: str | pathlib.Path,
    *,
    features: np.ndarray | None = None,
    batch_size: int = 8,
    length: int | None = None,
    restart: bool = False,
    label: str = "pooled features",
) -> dict[str, np.ndarray]:
    """What each side of the projection and each layer of the LM holds of a picture, on average.

    Only means leave the pass: no tensor of images by tokens by width is ever kept. A killed run
    continues where it stopped.

    Args:
      examples: each with an `image`.
      prompts: one an example. Image tokens stand before the question, so that only `lm.last`
        depends on it (with a Q-Former, all but `vision` do).
      path: a folder for the arrays; it belongs to one model and processor, and to these pictures,
        prompts and features. Examples may be added after them.
      features: float[N, P, E] of the examples, see `vision_features`; then the tower is not run.
      length: tokens of a row, so that all batches are alike.
      restart: remove what is there.

    Returns:
      Mapped arrays: `vision` float32[N, E], before the projection, and `projector` float32[N, D],
      after it, means over the patches; `lm.image` float32[N, L, D], what leaves each layer, mean
      over the image tokens; `lm.last` float32[N, L, D], the same at the last token.

    Raises:
      ValueError: examples and prompts are not as many, or the folder holds features of something
        else, or is damaged.
    """
    if len(prompts) != len(examples) or not len(examples):
        raise ValueError(f"{len(examples)} examples for {len(prompts)} prompts")
    folder = pathlib.Path(path)
    store = RowStore(
        folder / "progress.json", lambda name: folder / f"{name}.npy", len(examples),
        restart=restart, model=model, processor=processor,
    )  # fmt: skip

    def item(i: int) -> tuple:
        """What the rows of an example depend on."""
        row = None if features is None else np.asarray(features[i])
        return picture_content(examples[i]), prompts[i], row

    store.resume(map(item, range(len(examples))))
    with tqdm.tqdm(total=len(examples), initial=store.done, desc=label, leave=False) as bar:
        while store.done < len(examples):
            at = slice(store.done, store.done + batch_size)
            some = range(len(examples))[at]
            pictures = [examples[i].image for i in some]
            given = _given(model.config, pictures, features, at)
            batch = processor(prompts=prompts[at], rows=batch_size, length=length, **given)
            rows = _pooled(model, batch.replace(processor=None), len(pictures))
            store.append([item(i) for i in some], rows)
            bar.update(len(pictures))
    return store.arrays()


def _given(config, pictures: list, features, at: slice) -> dict:
    """What the processor reads of some pictures: they, or their features."""
    if features is None:
        return {"images": pictures}
    # PIL says the width first; only a model that cuts pictures needs their size
    sizes = [p.size[::-1] for p in pictures] if config.pinpoints else None
    return {"images": None, "features": np.asarray(features[at]), "sizes": sizes}


def _pooled(model, batch, rows: int) -> dict[str, np.ndarray]:
    """The arrays of a batch, of its first rows."""
    with mesh.use_mesh_of(model):
        batch = batch.replace(
            features=mesh.gather_to_host(encode_pictures(model, mesh.shard_batch(batch)))
        )
    found = run.run(model, batch, None, CAPTURES, logits="none").captures
    patches = batch.features[:, -(model.config.vision.grid**2) :].mean(1)  # CLS comes before
    made = {
        "vision": mean_over_tiles(model.config, batch, patches),
        "projector": found["projector"],
        "lm.image": np.asarray(found["lm.image"]).swapaxes(0, 1),
        "lm.last": np.asarray(found["lm.last"]).swapaxes(0, 1),
    }
    return {name: np.asarray(values[:rows], np.float32) for name, values in made.items()}
