"""The dictionary of a benchmark, drawn alike on all sides; imports NumPy alone."""

from __future__ import annotations

import numpy as np


def weights(width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a JumpReLU autoencoder of 4 D latents, of which about a tenth is active, by name."""
    rng, count = np.random.default_rng(seed), 4 * width
    encoder = rng.standard_normal((width, count), np.float32) / np.float32(width**0.5)
    decoder = rng.standard_normal((count, width), np.float32) / np.float32(width**0.5)
    return {
        "W_enc": encoder,
        "b_enc": np.full(count, -0.5, np.float32),
        "threshold": np.full(count, 1.0, np.float32),
        "W_dec": decoder,
        "b_dec": np.zeros(width, np.float32),
    }


def edited(width: int, count: int) -> np.ndarray:
    """Return which latents are ablated, one by one, int64[count]."""
    return np.random.default_rng(1).permutation(4 * width)[:count]
