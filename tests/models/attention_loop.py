"""Attention a query at a time, and the masks of the library."""

from __future__ import annotations

import numpy as np


def masks(kind: str, rng, B: int, N: int, T: int, S: int) -> np.ndarray | None:
    """The masks of the library: bool[B, 1 or N, T or 1, S]."""
    causal = np.tril(np.ones((T, S), bool), S - T)[None, None].repeat(B, 0)
    if kind == "none":
        return None
    if kind == "vision":  # for all queries of a tile
        return rng.random((B, 1, 1, S)) < 0.7
    if kind == "padding":
        return causal & (np.arange(S) >= rng.integers(0, S, (B, 1, 1, 1)))
    if kind == "segments":
        segment = np.sort(rng.integers(0, 3, (B, S)), 1)
        own = segment[:, None, :] == segment[:, S - T :, None]
        return causal & ((segment == 0)[:, None, :] | own)[:, None]
    if kind == "forward":
        block = np.sort(rng.integers(0, 3, (B, S)), 1)
        return causal | (block[:, None, None, :] == block[:, None, S - T :, None])
    if kind == "window":
        return causal & np.triu(np.ones((T, S), bool), S - T - 4)
    knocked_out = rng.random((B, N, T, S)) < 0.4
    return causal & ~knocked_out


KINDS = ("none", "vision", "padding", "segments", "forward", "window", "knockout")


def attend_in_a_loop(query, key, value, mask, weight, scale, softcap):
    """The heads, and the gradients of sum(weight * heads), a query at a time in float64."""
    query, key, value, weight = (np.asarray(a, np.float64) for a in (query, key, value, weight))
    (B, T, N, H), S = query.shape, key.shape[2]
    heads, *slopes = np.zeros((B, T, N, H)), *map(np.zeros_like, (query, key, value))
    mask = np.broadcast_to(True if mask is None else mask, (B, N, T, S))
    for b, t, n in np.ndindex(B, T, N):
        k, at = n * key.shape[1] // N, np.flatnonzero(mask[b, n, t])
        if not len(at):
            continue
        scores = scale * key[b, k, at] @ query[b, t, n]
        slope = np.full(len(at), scale)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
            slope = scale * (1 - (scores / softcap) ** 2)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        heads[b, t, n] = shares @ value[b, k, at]
        by_share = value[b, k, at] @ weight[b, t, n]
        by_product = slope * shares * (by_share - shares @ by_share)
        slopes[0][b, t, n] = by_product @ key[b, k, at]
        slopes[1][b, k, at] += np.outer(by_product, query[b, t, n])
        slopes[2][b, k, at] += np.outer(shares, weight[b, t, n])
    return heads, slopes


def assert_near(got, want, tolerance=1e-6):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
