"""The work of all sides: one random model and one set of inputs, in files that all sides read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mllm_jax as mj
from benchmarks.rivals import serve
from mllm_jax import families, tokens
from mllm_jax.batch import Batch
from mllm_jax.models.clip import ClipConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel

BATCH = 8  # rows of a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The amount of work.

    Attributes:
      config: The config of the model. transformers loads its checkpoint, so no patch is folded.
      words: The number of words of a row, the first before the image and the others after it.
      edits: The number of ablations of a sweep.
      groups: The number of sets of neurons in each layer.
      candidates: The number of answers to score.
      answer: The number of tokens of the longest answer.
      steps: The number of tokens to generate.
      fold: The patches of fold x fold neighbours are one image token where the projector trains.
      dtype: The dtype of the parameters.
    """

    config: MultimodalConfig
    words: int = 60
    edits: int = 96
    groups: int = 4
    candidates: int = 47
    answer: int = 6
    steps: int = 32
    fold: int = 2
    dtype: str = "float32"


def model_config(*args: Any, **options: Any) -> MultimodalConfig:
    """Return a config of LLaVA, see `of` of its config."""
    config: Any = families.FAMILIES["llava"].config
    return config.of(*args, **options)


def _tiny() -> MultimodalConfig:
    return model_config(ClipConfig.tiny(), DecoderConfig.tiny(), fold=1, image_token=95)


def _small() -> MultimodalConfig:
    vision, lm = ClipConfig.vit_b_16(), DecoderConfig.smollm2_135m()
    return model_config(vision, lm, fold=1, image_token=lm.vocab - 1)


SIZES = {
    "tiny": Size(config=_tiny(), words=16, edits=8, groups=2, candidates=9, steps=8),
    "small": Size(config=_small()),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """The model, the inputs and their files.

    Attributes:
      size: The amount of work.
      model: A random model.
      inputs: Arrays by name, see `make_inputs`.
      fields: Plain values: pictures, batch, steps, answer, image_token, ablated_layer,
        steered_layers, fold, dtype, and whether rivals use an accelerator.
      directory: A folder with `checkpoint/` in the layout of Hugging Face, `inputs.npz` and
        `work.json`.
    """

    size: Size
    model: MultimodalModel
    inputs: dict[str, np.ndarray]
    fields: dict[str, Any]
    directory: pathlib.Path

    @property
    def batches(self) -> list[Batch]:
        """The batches of all pictures."""
        pictures = self.fields["pictures"]
        return [self.batch(i, min(BATCH, pictures - i)) for i in range(0, pictures, BATCH)]

    def first(self, pictures: int) -> Work:
        """Return the work with the first pictures alone."""
        return dataclasses.replace(self, **serve.first(self.inputs, self.fields, pictures))

    def batch(self, start: int = 0, rows: int = BATCH) -> Batch:
        """Return a batch of rows, from `start` on."""
        at = slice(start, start + rows)
        return to_batch(self.size.config, self.inputs["ids"][at], self.inputs["pixels"][at])


def to_batch(config: MultimodalConfig, ids: np.ndarray, pixels: np.ndarray) -> Batch:
    """Return inputs as a batch of our models."""
    rows, T = ids.shape
    image, side = ids == config.image_token, config.token_grid
    number = np.where(image, image.cumsum(-1) - 1, -1)
    kind = np.full(ids.shape, tokens.CODE["question"], np.int8)
    kind[:, 0], kind[image] = tokens.CODE["system"], tokens.CODE["image"]
    first = config.image_tokens * np.arange(rows)[:, None]
    return Batch(
        ids=ids.astype(np.int32),
        position=np.broadcast_to(np.arange(T, dtype=np.int32), ids.shape),
        tokens=tokens.TokenMap(
            kind=kind,
            row=np.where(image, number // side, -1).astype(np.int16),
            column=np.where(image, number % side, -1).astype(np.int16),
            tile=np.where(image, 0, -1).astype(np.int16),
            last=np.broadcast_to(np.arange(T) == T - 1, ids.shape),
        ),
        image_token_index=np.where(image, first + number, -1).astype(np.int32),
        pixels=pixels.transpose(0, 2, 3, 1),
        tile=np.zeros((rows,), np.int16),
        is_real_tile=np.ones((rows,), bool),
    )


def make(size: Size, directory: pathlib.Path, pictures: int, accelerator: bool = False) -> Work:
    """Make the work and write it.

    Args:
      size: The amount of work.
      directory: An empty folder.
      pictures: The number of rows.
      accelerator: Whether rivals compute on an accelerator, and it draws the weights.
    """
    noise = device_noise if accelerator else host_noise
    model, inputs = random_model(size.config, noise(0, size.dtype)), make_inputs(size, pictures)
    layers = size.config.lm.layers
    fields = {
        "pictures": pictures,
        "batch": BATCH,
        "steps": size.steps,
        "answer": size.answer,
        "image_token": size.config.image_token,
        "ablated_layer": layers // 3,
        "steered_layers": (layers // 2, layers * 3 // 4),
        "fold": size.fold,
        "dtype": size.dtype,
        "accelerator": accelerator,
    }
    mj.save_hf(model, None, directory / "checkpoint")
    np.savez(directory / "inputs.npz", allow_pickle=False, **inputs)
    (directory / "work.json").write_text(json.dumps(fields))
    return Work(size, model, inputs, fields, directory)


Noise = Callable[[tuple[int, ...], float, float], jax.Array]  # shape, mean, deviation


def host_noise(seed: int = 0, dtype: str = "float32") -> Noise:
    """Return what draws normal numbers with NumPy, which has nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], mean: float, deviation: float) -> jax.Array:
        return jnp.asarray(mean + deviation * rng.standard_normal(shape, np.float32), dtype)

    return draw


def device_noise(seed: int = 0, dtype: str = "float32") -> Noise:
    """Return what draws normal numbers on the device, for billions of them."""
    keys = map(functools.partial(jax.random.fold_in, jax.random.key(seed)), itertools.count())

    @functools.partial(jax.jit, static_argnames="shape")
    def normal(key, shape, mean, deviation):
        return (mean + deviation * jax.random.normal(key, shape, dtype)).astype(dtype)

    return lambda shape, mean, deviation: normal(next(keys), shape, mean, deviation)


def random_model(config: MultimodalConfig, noise: Noise | None = None) -> MultimodalModel:
    """Return a model of random weights that keep tensors of order 1.

    Args:
      config: The config of the model.
      noise: What draws them; None is `host_noise()`. The initialisers of flax are slow to
        compile.
    """
    noise = noise or host_noise()

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return noise(leaf.shape, 1.0, 0.2)
        if "kernel" in name:
            return noise(leaf.shape, 0.0, 0.7 / float(leaf.shape[-2]) ** 0.5)
        # The embedding may be the head as well: logits of order 1 to 10.
        return noise(leaf.shape, 0.0, 0.3 if "embed" in name else 0.2)

    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_inputs(size: Size, pictures: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return all inputs by name.

    Returns:
      `ids`, int64[rows, T], with the tokens of the image; all rows have the same length, so no
      side pads. `pixels`, float32[rows, 3, row, column]. `options`, int64[4], the ids of the
      answer letters. `layers`, int64[R], and `neurons`, int64[R, n], of the ablations of the
      sweep. `candidates`, int64[C, A], padded with -1. `ablated`, int64[n], and `vector`,
      float32[D], of the edits of the generation. `fold_kernel_0`, float32[fold^2 E, D], and
      `fold_kernel_1`, float32[D, D], of a projector of folded patches.
    """
    rng, config = np.random.default_rng(seed), size.config
    L, F, side = config.lm.layers, config.lm.mlp, config.vision.image_size
    words = rng.integers(1, config.lm.vocab - 1, (pictures, size.words))
    image = np.full((pictures, config.image_tokens), config.image_token)
    groups = [rng.permutation(F)[: F // 16] for _ in range(size.groups)]
    depths = np.linspace(0, L - 1, size.edits // size.groups).round().astype(int)
    candidates = rng.integers(1, config.lm.vocab - 1, (size.candidates, size.answer))
    lengths = rng.integers(3, size.answer + 1, size.candidates)
    lengths[0] = size.answer
    candidates[np.arange(size.answer) >= lengths[:, None]] = -1
    widths = size.fold**2 * config.vision.width, config.lm.width, config.lm.width
    projector = np.random.default_rng([seed, 1])
    kernels = [
        projector.standard_normal((n, m), np.float32) * 0.7 / np.float32(n**0.5)
        for n, m in itertools.pairwise(widths)
    ]
    return {
        "ids": np.concatenate([words[:, :1], image, words[:, 1:]], 1),
        "pixels": rng.standard_normal((pictures, 3, side, side), np.float32),
        "options": rng.choice(config.lm.vocab - 1, 4, replace=False),
        "layers": np.repeat(depths, size.groups),
        "neurons": np.stack(groups * len(depths)),
        "candidates": candidates,
        "ablated": rng.permutation(F)[: F // 16],
        "vector": rng.standard_normal(config.lm.width, np.float32),
        **{f"fold_kernel_{i}": kernel for i, kernel in enumerate(kernels)},
    }
