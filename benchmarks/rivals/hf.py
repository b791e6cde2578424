"""Parts of all rivals in torch: the checkpoint with sdpa attention, and its inputs.

A rival uses a GPU if the work asks for an accelerator and torch finds one, and the CPU otherwise.
"""

from __future__ import annotations

import copy
import functools
import os
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.rivals.serve import Work

torch.set_num_threads(os.cpu_count() or 1)


def load(work: Work, attention: str = "sdpa") -> Any:
    """Return the `LlavaForConditionalGeneration` of the checkpoint.

    Every call returns modules of its own, with hooks of their own, around the same parameters.
    """
    model = _read_once(work.checkpoint, dtype(work), device(work), attention)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def read(
    checkpoint: pathlib.Path, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> Any:
    """Read the checkpoint onto a device."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation=attention
    )
    return model.eval().to(device)


_read_once = functools.cache(read)


def dtype(work: Work) -> torch.dtype:
    """Return the dtype of the parameters."""
    return getattr(torch, work.fields["dtype"])


def device(work: Work) -> torch.device:
    """Return the device that computes."""
    found = work.fields["accelerator"] and torch.cuda.is_available()
    return torch.device("cuda" if found else "cpu")


def tensor(work: Work, name: str, start: int = 0, rows: int | None = None) -> torch.Tensor:
    """Return some rows of an input on the device, by default all; pixels in the model's dtype."""
    array = work.inputs[name]
    found = torch.from_numpy(array[start : len(array) if rows is None else start + rows])
    return found.to(device(work), dtype(work) if name == "pixels" else None)


def blocks(model: Any) -> Any:
    """Return the `ModuleList` of the decoder layers of the language model."""
    return model.model.language_model.layers


def merged(model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return [B, T, D], the word embeddings with the features of the images."""
    embeds = model.get_input_embeddings()(ids)
    features = model.model.get_image_features(pixel_values=pixels).pooler_output
    place = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    return embeds.masked_scatter(place, torch.cat(tuple(features)))


def numpy(**tensors: torch.Tensor) -> dict[str, np.ndarray]:
    """Return results as NumPy arrays, in float32 where they are bfloat16."""
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
        for name, value in tensors.items()
    }
