"""Entropy of the logit lens, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from mllm_jax.analysis import checks, intervals


def entropy_curve(
    sums: np.ndarray, tokens: np.ndarray, **options: Any
) -> intervals.Interval[np.ndarray]:
    """Compute the mean entropy per token by layer and kind, with an interval over examples.

    Args:
      sums: float[N, L, kinds], sum of the logit-lens entropies of an example's tokens, nats.
      tokens: int[N, kinds], number of those tokens. An example may have none of a kind, but not
        all examples.
      **options: Level, resamples and seed, as in `intervals.ratio`.

    Returns:
      The interval of float64[L, kinds], nats.
    """
    sums, tokens = checks.finite(sums, "sums"), checks.finite(tokens, "tokens")
    if sums.ndim != 3 or tokens.shape != (sums.shape[0], sums.shape[2]):
        raise ValueError(
            "sums must be [N, L, kinds] and tokens [N, kinds], "
            f"got shapes {sums.shape} and {tokens.shape}"
        )
    return intervals.ratio(sums, tokens[:, None, :], **options)
