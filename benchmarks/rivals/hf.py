"""Parts of all rivals in torch: the checkpoint in float32 with sdpa attention, and its inputs."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.rivals.serve import Work

torch.set_num_threads(os.cpu_count() or 1)


def load(work: Work, attention: str = "sdpa") -> Any:
    """Return the `LlavaForConditionalGeneration` of the checkpoint."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        work.checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def tensor(work: Work, name: str, start: int = 0, rows: int | None = None) -> torch.Tensor:
    """Return some rows of an input, by default all."""
    array = work.inputs[name]
    return torch.from_numpy(array[start : len(array) if rows is None else start + rows])


def blocks(model: Any) -> Any:
    """Return the `ModuleList` of the decoder layers of the language model."""
    return model.model.language_model.layers


def merged(model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return float32[B, T, D], the word embeddings with the features of the images."""
    embeds = model.get_input_embeddings()(ids)
    features = model.model.get_image_features(pixel_values=pixels).pooler_output
    place = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    return embeds.masked_scatter(place, torch.cat(tuple(features)))


def numpy(**tensors: torch.Tensor) -> dict[str, np.ndarray]:
    """Return results as NumPy arrays."""
    return {name: value.detach().numpy() for name, value in tensors.items()}
