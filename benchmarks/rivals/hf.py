"""What the rivals in torch share: the checkpoint in float32 with sdpa attention, and its inputs."""

from __future__ import annotations

import os

import numpy as np
import torch
import transformers

from benchmarks.rivals.serve import Work

torch.set_num_threads(os.cpu_count())


def load(work: Work, attention: str = "sdpa") -> transformers.LlavaForConditionalGeneration:
    """The model that all sides have."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        work.checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def tensor(work: Work, name: str, start: int = 0, rows: int | None = None) -> torch.Tensor:
    """Some rows of an input; all by default."""
    array = work.inputs[name]
    return torch.from_numpy(array[start : len(array) if rows is None else start + rows])


def blocks(model) -> torch.nn.ModuleList:
    """The decoder layers of the language model."""
    return model.model.language_model.layers


def merged(model, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """float32[B, T, D]: word embeddings with the image tokens in place."""
    embeds = model.get_input_embeddings()(ids)
    features = model.model.get_image_features(pixel_values=pixels).pooler_output
    place = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    return embeds.masked_scatter(place, torch.cat(tuple(features)))


def numpy(**tensors: torch.Tensor) -> dict[str, np.ndarray]:
    """Results as they are sent."""
    return {name: value.detach().numpy() for name, value in tensors.items()}
