"""Random weights and batches for tiny models."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.families.llava import model as llava

TINY = llava.LlavaConfig.tiny()


def random_model(config: llava.LlavaConfig, seed: int = 0) -> llava.Llava:
    """Random weights that keep tensors of order 1; no factor of a norm is one and no bias zero.

    By NumPy: the initialisers of flax take 20 s to compile.
    """
    rng = np.random.default_rng(seed)
    # Where the factor of a norm is 1 + its scale.
    offset = (".lm",) if config.lm.unit_offset else ()
    if config.projector is not None and config.projector.norm == "unit_offset_rms":
        offset += (".projector",)

    def draw(path, leaf):
        name, noise = jax.tree_util.keystr(path), rng.normal(size=leaf.shape).astype(np.float32)
        if "scale" in name:
            return jnp.asarray((0 if name.startswith(offset) else 1) + 0.2 * noise)
        if "kernel" in name:
            return jnp.asarray(0.7 * noise / np.sqrt(leaf.shape[-2]))
        if name.startswith(".lm.embed"):  # the pass multiplies it, and a tied head does not
            return jnp.asarray(noise / config.lm.embedding_scale)
        return jnp.asarray(noise if "embed" in name else 0.2 * noise)

    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_batch(
    config: llava.LlavaConfig = TINY,
    *,
    images: Sequence[int] = (1, 1),
    words: Sequence[int] = (11, 8),
    pad: str = "right",
    length: int | None = None,
    fill: int = 0,
    seed: int = 0,
) -> Batch:
    """A batch of random words and pixels, in NumPy.

    A row is one system word, then for every image a question word and the image's tokens, then
    the question words that are left.

    Args:
      config: The model it is for.
      images: How many in each row.
      words: How many in each row, more than its images.
      pad: "right" or "left", where the padding of shorter rows stands.
      length: T; the longest row by default.
      fill: Further images that belong to no row (`real` is False).
      seed: Of the words and pixels. A row's are its own: they do not depend on the other rows.
    """
    lengths = [w + n * config.image_tokens for w, n in zip(words, images, strict=True)]
    T = length or max(lengths)
    rows, pixels, count = [], [], 0
    for number, (n, w) in enumerate(zip(images, words, strict=True)):
        rng = np.random.default_rng((seed, number))
        gap = T - w - n * config.image_tokens
        room = (gap, 0) if pad == "left" else (0, gap)
        rows.append({name: np.pad(column, room, constant_values=EMPTY[name])
                     for name, column in _row(config, n, w, count, rng).items()})  # fmt: skip
        pixels.append(_pixels(config, n, rng))
        count += n
    pixels.append(_pixels(config, fill, np.random.default_rng((seed, len(images)))))
    columns = {name: np.stack([row[name] for row in rows]) for name in EMPTY}
    return Batch(
        tokens=tokens.TokenMap(
            **{name: columns.pop(name) for name in ("kind", "row", "column", "tile", "last")}
        ),
        **columns,
        pixels=np.concatenate(pixels),
        tile=np.concatenate([*map(np.arange, images), np.arange(fill)]).astype(np.int16),
        is_real_tile=np.arange(count + fill) < count,
    )


# What a padding token has in each field.
EMPTY = {"ids": 0, "position": 0, "image_token_index": -1, "kind": 0, "row": -1, "column": -1, "tile": -1,
         "last": False}  # fmt: skip


def _row(config, images: int, words: int, first: int, rng) -> dict[str, np.ndarray]:
    """The fields of one row without padding; `first` counts the images of the rows before."""
    size = config.image_tokens
    side, tiles, real = config.token_grid, np.arange(images), np.ones(images, bool)
    grid = tokens.TokenMap.grid(tiles, (side, side), size > side**2, real)
    if not side:
        grid = tokens.TokenMap.alike("image", size, tiles, real)
    at = np.concatenate([2 + i * (size + 1) + np.arange(size) for i in range(images)] or [[]])
    at = at.astype(int)
    T = words + images * size
    row = {
        "ids": rng.integers(1, min(config.image_token, config.lm.vocab), T, dtype=np.int32),
        "position": np.arange(T, dtype=np.int32),
        "image_token_index": np.full(T, -1, np.int32),
        "kind": np.full(T, tokens.CODE["question"], np.int8),
        "row": np.full(T, -1, np.int16),
        "column": np.full(T, -1, np.int16),
        "tile": np.full(T, -1, np.int16),
        "last": np.arange(T) == T - 1,
    }
    row["kind"][0] = tokens.CODE["system"]
    row["ids"][at] = config.image_token
    row["image_token_index"][at] = first * size + np.arange(len(at))
    for name in ("kind", "row", "column", "tile"):
        row[name][at] = getattr(grid, name).reshape(-1)
    return row


def _pixels(config, images: int, rng) -> np.ndarray:
    side = config.vision.image_size
    return rng.normal(size=(images, side, side, 3)).astype(np.float32)
