"""The start of training: a projector whose outputs have the scale of word embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.interventions.tap import Taps
from mllm_jax.models import projector
from mllm_jax.sharding import mesh


def scale_projector(model: Any, features: np.ndarray, *, gain: float = 4.0) -> Any:
    """Scale the random projector of a model to the features that it will read.

    The first layer absorbs the mean and standard deviation of the features, which standardises its
    inputs; the last is scaled to `gain` times the standard deviation of word embeddings.

    Args:
      model: the model, whose projector is changed in place.
      features: float[N, P, E], a sample of vision features.
      gain: scale of image tokens relative to words; at 1 the LM hardly attends to them.

    Returns:
      The model.
    """
    linears = model.projector.linears
    folded = np.asarray(projector.fold(jnp.asarray(features), model.config.projector.fold))
    flat = folded.reshape(-1, folded.shape[-1]).astype(np.float64)
    mean, deviation = flat.mean(0), flat.std(0) + 1e-6
    first, last = linears[0], linears[-1]
    kernel = mesh.to_numpy(first.kernel[...]) / deviation[:, None]
    first.kernel[...] = _placed_like(first.kernel[...], kernel)
    first.bias[...] = _placed_like(first.bias[...], -mean @ kernel)
    out = model.projector(jnp.asarray(features), Taps().module("projector"))
    embedding_deviation = float(jnp.std(model.lm.embed[...]))
    factor = gain * embedding_deviation / float(jnp.std(out))
    last.kernel[...] = last.kernel[...] * factor
    return model


def _placed_like(array: jax.Array, values: np.ndarray) -> jax.Array:
    """Place values of the host as an array is placed, in its dtype, on the devices of all."""
    return jax.device_put(np.asarray(values, array.dtype), array.sharding)
