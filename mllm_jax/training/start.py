"""The start of training: a projector whose outputs have the scale of word embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.interventions.tap import Taps
from mllm_jax.models import projector
from mllm_jax.sharding import mesh


def scale_projector(
    model: Any, features: np.ndarray, is_patch: np.ndarray | None = None, *, gain: float = 4.0
) -> Any:
    """Scale the random projector of a model to the features that it will read.

    The first layer absorbs the mean (if it has a bias) and standard deviation of its inputs, which
    standardises them; the last is scaled to `gain` times the standard deviation of word embeddings.

    Args:
      model: The model, whose projector is changed in place.
      features: float[I, P, E], a sample of vision features, by tile.
      is_patch: bool[I, P], False for features that are padding; None if none is.
      gain: Scale of image tokens relative to words; at 1 the LM hardly attends to them.

    Returns:
      The model.
    """
    config, linears = model.config.projector, model.projector.linears
    x = jnp.asarray(features)[..., : config.in_width]
    real = np.ones(x.shape[:2], bool) if is_patch is None else np.asarray(is_patch)
    squares = projector.fold(jnp.asarray(real[..., None]), config.fold, in_blocks=config.in_blocks)
    is_token = np.asarray(squares).all(-1)
    flat = np.asarray(model.projector.fold(x))[is_token].astype(np.float64)
    mean, deviation = flat.mean(0), flat.std(0) + 1e-6
    first, last = linears[0], linears[-1]
    kernel = mesh.to_numpy(first.kernel[...]) / deviation[:, None]
    first.kernel[...] = _placed_like(first.kernel[...], kernel)
    if config.bias:
        first.bias[...] = _placed_like(first.bias[...], -mean @ kernel)
    out = np.asarray(model.projector(x, Taps().module("projector")))[is_token]
    factor = gain * float(jnp.std(model.lm.embed[...])) / float(np.std(out))
    for parameter in (last.kernel, last.bias) if config.bias else (last.kernel,):
        parameter[...] = parameter[...] * factor
    return model


def _placed_like(array: jax.Array, values: np.ndarray) -> jax.Array:
    """Put values of the host on devices with the sharding and dtype of an array."""
    return jax.device_put(np.asarray(values, array.dtype), array.sharding)
