"""Classification by CLIP without training: the class whose name is most similar to a picture.

model, processor = clip.load("openai/clip-vit-large-patch14-336")     # loading.clip
predicted = zero_shot.zero_shot(model, processor, pictures, task.classes)
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

# The template of the pipeline `zero-shot-image-classification` of transformers, which Verma et al.
# 2024 used with classes in lower case.
TEMPLATE = "This is a photo of {}."


def zero_shot(
    model: Clip,
    processor: ClipProcessor,
    pictures: Iterable,
    labels: Sequence[str],
    *,
    batch_size: int = 8,
) -> np.ndarray:
    """Return the most similar label of each picture, int32[N], counted from 0.

    Args:
      model: The model, from `loading.clip.load`.
      processor: Its processor.
      pictures: N pictures, see `data.pictures.read`; an iterator is read batch by batch.
      labels: C names of classes, which are used in lower case.
      batch_size: Number of pictures of a batch.
    """
    if not labels:
        raise ValueError("no labels to choose from")
    prompts = [TEMPLATE.format(label.lower()) for label in labels]
    model = mesh.replicate(model)
    texts = _texts(model, processor.texts(prompts))
    predicted = [np.zeros(0, np.int32)]
    count = operator.length_hint(pictures) or None
    with tqdm.tqdm(desc="CLIP zero-shot", total=count, leave=False) as bar:
        pictures = iter(pictures)
        while batch := list(itertools.islice(pictures, batch_size)):
            pixels = processor.pictures(batch)
            padded = np.zeros((batch_size, *pixels.shape[1:]), np.float32)
            padded[: len(batch)] = pixels
            logits = np.asarray(mesh.gather_to_host(_logits(model, padded, texts)))
            predicted.append(logits[: len(batch)].argmax(-1).astype(np.int32))
            bar.update(len(batch))
    return np.concatenate(predicted)


@jax.jit
def _texts(model: Clip, ids) -> jax.Array:
    return model.texts(ids)


@jax.jit
def _logits(model: Clip, pixels, texts) -> jax.Array:
    return model.logits(model.pictures(pixels, Taps()), texts)
