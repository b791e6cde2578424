"""What `tests/families/test_families.py` reads of a checkpoint of a family."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image

from mllm_jax import tokens
from mllm_jax.batch import Batch
from tests.helpers import hf


def inputs(batch: Batch, pictures: list[list[PIL.Image.Image]]) -> dict[str, np.ndarray]:
    """A batch of ours as the network of transformers wants it; tiles that fill it are left out."""
    found = {
        "input_ids": batch.ids.astype(int),
        "attention_mask": batch.valid.astype(int),
        "position_ids": batch.position.astype(int),
    }
    if batch.is_real_tile.any():
        found["pixel_values"] = batch.pixels[batch.is_real_tile].transpose(0, 3, 1, 2)
    if batch.processor.config.attends_forward == "picture":
        found["token_type_ids"] = (batch.tokens.kind == tokens.CODE["image"]).astype(int)
    if batch.processor.config.attends_forward == "prompt":
        found["token_type_ids"] = (batch.tokens.kind == tokens.CODE["answer"]).astype(int)
    if batch.processor.config.pinpoints:
        found["image_sizes"] = np.array([p.size[::-1] for row in pictures for p in row])
    return found


def placed(want: dict[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    """Tensors of real tiles at their places among all tiles of the batch, the others zero."""
    real = batch.is_real_tile

    def one(name: str, array: np.ndarray) -> np.ndarray:
        if name.startswith(("lm.", "logits")):
            return array
        axis = hf.sites.get(name).stacked
        out = np.zeros((*array.shape[:axis], len(real), *array.shape[axis + 1 :]), array.dtype)
        out[(slice(None),) * axis + (real,)] = array
        return out

    return {name: one(name, array) for name, array in want.items()}


@dataclasses.dataclass(frozen=True)
class Family:
    """A checkpoint.

    Attributes:
      config: Ours. network, processor: theirs, in float32. directory: where both were saved.
      written: What stands for a picture in a prompt of theirs. begins: a prompt in a template.
      where: Our sites among their modules, beside the `hf` column of `sites.TABLE`.
      trims: Whether the template trims texts.
      untold: Our sites that none of their modules tells. is_automatic: whether AutoProcessor works.
      inputs: (batch, pictures) -> what their network is given. placed: (their tensors, batch) ->
      the same at their places in the batch.
    """

    config: Any
    network: Any
    processor: Any
    directory: pathlib.Path
    written: str = "<image>"
    begins: str = "<s>"
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trims: bool = False
    untold: frozenset[str] = frozenset()
    is_automatic: bool = True
    inputs: Callable[..., dict[str, np.ndarray]] = inputs
    placed: Callable[..., dict[str, np.ndarray]] = placed

    @property
    def saved_config(self) -> Any:
        """Of what `save_hf` writes: layers above the features are left out."""
        vision = self.config.vision
        if vision.run_layers == vision.layers:
            return self.config
        changes = {"layers": vision.run_layers, "feature_layer": -1}
        return dataclasses.replace(self.config, vision=dataclasses.replace(vision, **changes))
