"""Entropy of the logit lens, layer by layer."""

from __future__ import annotations

import numpy as np

from mllm_jax.analysis import checks, intervals


def entropy_curve(sums: np.ndarray, tokens: np.ndarray, **options) -> intervals.Interval:
    """Mean entropy per token by layer and token kind, with a bootstrap interval over examples.

    Args:
        sums: float[N, L, kinds], sum over an example's tokens of the entropy of their lens, nats.
        tokens: int[N, kinds], number of those tokens. An example may lack a kind; at least one
            must have it.
        **options: level, resamples and seed, as in `intervals.ratio`.

    Returns:
        Interval of float64[L, kinds], nats.
    """
    sums, tokens = checks.finite(sums, "sums"), checks.finite(tokens, "tokens")
    if sums.ndim != 3 or tokens.shape != (sums.shape[0], sums.shape[2]):
        raise ValueError(
            "sums must be [N, L, kinds] and tokens [N, kinds], "
            f"got shapes {sums.shape} and {tokens.shape}"
        )
    return intervals.ratio(sums, tokens[:, None, :], **options)
