"""Norms, softmax, entropies and statistics are computed in float32 or better."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where it has more digits: a model in float64 stays in float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
