"""Writes a random LLaVA-1.5 of real size, in the form of `llava-hf/llava-1.5-7b-hf` on the hub.

    python -m tests.helpers.make_checkpoint DIRECTORY [--size=7b] [--layers=N] [--shards=4]

In bfloat16: 13.2 GiB for 7b, 24.9 GiB for 13b. Tensors are drawn one at a time, as they are written.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import zlib

import jax
import ml_dtypes
import numpy as np
import transformers
from flax import nnx

from mllm_jax import store
from mllm_jax.checkpoints import keys, tensors
from mllm_jax.families.llava import config as configs
from mllm_jax.families.llava import keys as llava_keys
from mllm_jax.families.llava import model as llava
from mllm_jax.loading import load
from tests.helpers import tiny

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZES = {
    "tiny": llava.LlavaConfig.of(
        llava.ClipConfig.tiny(), llava.DecoderConfig.tiny(), image_token=95
    ),
    "7b": llava.LlavaConfig.llava_1_5_7b(),
    "13b": llava.LlavaConfig.llava_1_5_13b(),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A random tensor, drawn when it is asked for the array: the same for the same key."""

    key: str
    shape: keys.Shape
    dtype: np.dtype = BFLOAT16

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(self.key.encode()))
        x = rng.standard_normal(self.shape, np.float32)
        if "norm" in self.key and self.key.endswith("weight"):
            x = 1 + 0.2 * x
        elif "embed" in self.key or self.key.endswith("bias"):
            x *= 0.2
        else:
            x *= 0.7 / math.prod(self.shape[1:]) ** 0.5
        return x.astype(dtype or self.dtype)


def cut(config: llava.LlavaConfig, layers: int | None) -> llava.LlavaConfig:
    """A LLaVA with so many layers in its LM."""
    if layers is None:
        return config
    return dataclasses.replace(config, lm=dataclasses.replace(config.lm, layers=layers))


def abstract(config: llava.LlavaConfig, dtype: np.dtype = BFLOAT16) -> llava.Llava:
    """The model without its numbers: shapes and dtype alone."""
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model)


def drawn(config: llava.LlavaConfig) -> list[Drawn]:
    """All tensors of the checkpoint; it has the vision layers that LLaVA does not read, too."""
    all_layers = dataclasses.replace(config.vision, feature_layer=-1)
    state = nnx.to_flat_state(nnx.state(abstract(dataclasses.replace(config, vision=all_layers))))
    shapes = {load.dotted(path): param.shape for path, param in state}
    found = [Drawn(s.key, s.shape) for s in keys.slots(shapes, llava_keys.key_table(config))]
    last = "vision_tower.vision_model.post_layernorm"
    return found + [Drawn(f"{last}.{kind}", (config.vision.width,)) for kind in ("weight", "bias")]


def write(directory: str | os.PathLike, config: llava.LlavaConfig, shards: int = 4) -> pathlib.Path:
    """Writes the checkpoint: shards, their index, `config.json`, a tokenizer of forty words.

    Args:
      directory: Made if it is missing.
      config: Of a LLaVA-1.5.
      shards: Files of about equal size.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    all_ = drawn(config)
    sizes = np.array([math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in all_])
    numbers = (np.cumsum(sizes) - sizes) * shards // sizes.sum()
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    for number, name in enumerate(names):
        inside = [tensor for tensor, n in zip(all_, numbers, strict=True) if n == number]
        tensors.write({tensor.key: tensor for tensor in inside}, directory / name)
        print(f"{directory / name}: {len(inside)} tensors", flush=True)
    places = {tensor.key: names[n] for tensor, n in zip(all_, numbers, strict=True)}
    index = {"metadata": {"total_size": int(sizes.sum())}, "weight_map": places}
    store.atomic_json(directory / "model.safetensors.index.json", index)
    tokenizer = tiny.tokenizer(config, bos_token="<s>")
    tokenizer.save_pretrained(directory)
    side = config.vision.image_size
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(directory)
    store.atomic_json(directory / "config.json", _fields(config))
    return directory


def _fields(config: llava.LlavaConfig) -> dict:
    """Those of the hub's `config.json`."""
    fields = configs.to_hf(config) | {"dtype": "bfloat16"}
    fields["vision_feature_layer"] = config.vision.feature_layer
    fields["vision_config"]["num_hidden_layers"] = config.vision.layers
    return fields


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.make_checkpoint")
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="of the LM; by default all")
    parser.add_argument("--shards", type=int, default=4)
    args = parser.parse_args(argv)
    write(args.directory, cut(SIZES[args.size], args.layers), args.shards)


if __name__ == "__main__":
    main()
