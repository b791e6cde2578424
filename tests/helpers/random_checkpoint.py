"""Writes a checkpoint of random numbers, of any size, in shards as the hub has them.

    python -m tests.helpers.random_checkpoint --model=llava-1.5-7b --directory=DIR

For trying what a released model costs where its weights are not at hand. It has no tokenizer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import zlib

import ml_dtypes
import numpy as np
from flax import nnx

from mllm_jax import families
from mllm_jax.checkpoints import keys, tensors
from mllm_jax.loading import load
from mllm_jax.models.multimodal import MultimodalConfig

SHARD = 2**32  # bytes


@dataclasses.dataclass(frozen=True)
class Noise:
    """A tensor of random numbers, made when its turn comes; of a norm, ones."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if "norm" in self.key.lower():
            return np.full(self.shape, self.key.endswith("weight"), self.dtype)
        rng = np.random.Generator(np.random.SFC64(zlib.crc32(self.key.encode())))
        scale = np.float32(0.02 if "embed" in self.key else self.shape[-1] ** -0.5)
        noise = rng.standard_normal(self.shape, np.float32)
        noise *= scale
        return noise.astype(self.dtype)


def write(
    config: MultimodalConfig,
    directory: pathlib.Path,
    dtype: np.typing.DTypeLike = ml_dtypes.bfloat16,
    shard: int = SHARD,
) -> None:
    """Writes the checkpoint.

    Args:
      config: Of the model.
      directory: Made if it is missing.
      dtype: Of all tensors. shard: bytes that a shard may have, unless it is one tensor.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))))
    shapes = {load.dotted(path): param.shape for path, param in state}
    shards: list[dict[str, Noise]] = [{}]
    table = families.of(config).key_table(config)
    slots = {slot.key: slot for slot in keys.slots(shapes, table)}
    for _, slot in sorted(slots.items()):
        tensor = Noise(slot.key, slot.shape, np.dtype(dtype))
        if shards[-1] and tensor.nbytes + sum(t.nbytes for t in shards[-1].values()) > shard:
            shards.append({})
        shards[-1][slot.key] = tensor
    places: dict[str, str] = {}
    for number, part in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors.write(part, directory / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(families.of(config).to_hf(config)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=families.RELEASED, required=True)
    parser.add_argument("--directory", type=pathlib.Path, required=True)
    asked = parser.parse_args()
    write(families.RELEASED[asked.model](), asked.directory)


if __name__ == "__main__":
    main()
