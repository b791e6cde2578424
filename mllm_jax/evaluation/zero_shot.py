"""Classification by CLIP without training: the class whose name fits a picture best.

model, processor = clip.load("openai/clip-vit-large-patch14-336")     # checkpoints.clip
said = zero_shot.zero_shot(model, processor, pictures, task.classes)
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence

import jax
import numpy as np
import tqdm

from mllm_jax.interventions.tap import Taps
from mllm_jax.models.clip_text import Clip
from mllm_jax.processors.clip import ClipProcessor
from mllm_jax.sharding import mesh

# What the pipeline `zero-shot-image-classification` of transformers says, which Verma et al. 2024
# gave the classes in lower case.
TEMPLATE = "This is a photo of {}."


def zero_shot(
    model: Clip,
    processor: ClipProcessor,
    pictures: Iterable,
    labels: Sequence[str],
    *,
    batch_size: int = 8,
) -> np.ndarray:
    """int32[N]: of each picture, the label that fits it best, counted from 0.

    Args:
        model, processor: as `checkpoints.clip.load` gives them.
        pictures: N, see `data.pictures.read`; read as they are needed.
        labels: C names of classes; they are read in lower case.
        batch_size: pictures at one time.
    """
    if not labels:
        raise ValueError("no labels to choose from")
    prompts = [TEMPLATE.format(label.lower()) for label in labels]
    model = mesh.replicate(model)
    texts = _texts(model, processor.texts(prompts))
    found = [np.zeros(0, np.int32)]
    count = operator.length_hint(pictures) or None
    with tqdm.tqdm(desc="CLIP zero-shot", total=count, leave=False) as bar:
        pictures = iter(pictures)
        while some := list(itertools.islice(pictures, batch_size)):
            pixels = processor.pictures(some)
            full = np.zeros((batch_size, *pixels.shape[1:]), np.float32)
            full[: len(some)] = pixels
            logits = np.asarray(mesh.gather_to_host(_logits(model, full, texts)))
            found.append(logits[: len(some)].argmax(-1).astype(np.int32))
            bar.update(len(some))
    return np.concatenate(found)


@jax.jit
def _texts(model: Clip, ids) -> jax.Array:
    return model.texts(ids)


@jax.jit
def _logits(model: Clip, pixels, texts) -> jax.Array:
    return model.logits(model.pictures(pixels, Taps()), texts)
