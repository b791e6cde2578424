"""Where training starts: a projector whose outputs have the scale of words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.interventions.tap import Taps
from mllm_jax.models import projector
from mllm_jax.sharding import mesh


def scale_projector(model, features: np.ndarray, *, gain: float = 4.0):
    """The model with its random projector fitted to the features it will see.

    The first map takes the features' mean and deviation into itself, so that its inputs are
    standardised; the last is scaled to `gain` times the deviation of word embeddings.

    Args:
      features: float[N, P, E], a sample of vision features.
      gain: image tokens need more than the scale of words to be heard at all.
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
    words = float(jnp.std(model.lm.embed[...]))
    factor = gain * words / float(jnp.std(out))
    last.kernel[...] = last.kernel[...] * factor
    return model


def _placed_like(array: jax.Array, values: np.ndarray) -> jax.Array:
    """Values of the host in the dtype of an array and where it lies, on the devices of all."""
    return jax.device_put(np.asarray(values, array.dtype), array.sharding)
