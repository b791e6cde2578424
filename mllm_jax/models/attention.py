"""Attention: by cuDNN, or all scores at once, or a block of keys at a time if rows are long."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.models import blockwise_attention, cudnn_attention
from mllm_jax.models.blockwise_attention import ScoreRule
from mllm_jax.numerics import precision, rows
from mllm_jax.typing import Array, Bool, Float

KeysAndValues = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]

# The number of scores of a head above which queries are processed in blocks, each of which
# recomputes its scores in the backward pass; and the number above which keys are processed in
# blocks too (on TPUs the first one). Each block of keys reads and writes the heads once more: on an
# H100, rows of 3,072 tokens would move 1.4 times the bytes. A TPU keeps a block on the chip if the
# rows and heads of which it is have few scores.
MAX_SCORES_AT_ONCE = 2**18
MAX_SCORES_ON_CHIP = 2**22
MAX_SCORES_OF_ALL_KEYS = 2**24
QUERY_BLOCKS = 4


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "#B #N #T S"] | None,
    *,
    past: KeysAndValues | None = None,
    pattern: Callable[[Array], Array] | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Compute softmax(scale q k^T) v, with N / K query heads for each key-value head.

    Args:
      query: The queries.
      key: The keys.
      value: The values.
      mask: True where a query may attend to a key; None for all keys. The result of a query that
        may not attend to any key is zero.
      past: Earlier keys and values; S of the mask counts both.
      pattern: A function applied to the probabilities [B, N, T, S] before they multiply the
        values. With None the probabilities need not all exist at the same time.
      causal: Whether the mask is causal, so that products with later keys can be left out.
      scale: The factor of the products; 1 / sqrt(H) by default.
      softcap: The bound c of the products s, which become c tanh(s / c) (Gemma 2); None if there
        is none.
    """
    rule = ScoreRule(query.shape[-1] ** -0.5 if scale is None else scale, softcap)
    parts = [(key, value)] if past is None else [past, (key, value)]
    if pattern is not None:
        return _attend_at_once(rule, query, parts, mask, pattern)
    if mask is not None:  # neither rows on a CPU nor lanes of cuDNN share a mask
        mask = jnp.broadcast_to(mask, (len(query), *mask.shape[1:]))
    plainly = functools.partial(_attend_plainly, rule, causal and past is None)
    if past is None and cudnn_attention.supports(query, softcap):
        return cudnn_attention.attend(
            lambda query, key, value, mask: plainly(query, [(key, value)], mask),
            query, key, value, mask, scale=rule.scale, causal=causal,
        )  # fmt: skip
    return plainly(query, parts, mask)


def _attend_plainly(
    rule: ScoreRule, causal: bool, query: Array, parts: Sequence[KeysAndValues], mask: Array | None
) -> Float[Array, "B T N H"]:
    """Attend by operations of XLA, with as many scores at a time as the rows are long."""
    (B, T, N, _), S = query.shape, sum(key.shape[2] for key, _ in parts)
    scores = B * N * T * S
    attend_part = functools.partial(_attend_at_once, rule)
    if T * S > MAX_SCORES_AT_ONCE:
        attend_part = functools.partial(_attend_long, rule, T * S > MAX_SCORES_OF_ALL_KEYS)
        attend_part = functools.partial(_by_query_block, jax.checkpoint(attend_part), causal)
    elif causal and scores > rows.MAX_ELEMENTS_AT_ONCE:
        attend_part = functools.partial(_by_query_block, attend_part, causal)
    return rows.map_rows_on_cpu(attend_part, query, parts, mask, num_elements=scores)


def _by_query_block(
    attend_part: Callable[..., Array], causal: bool, query: Array,
    parts: Sequence[KeysAndValues], mask: Array | None,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Attend in blocks of queries; if causal, each only to the keys up to its end."""
    T = query.shape[1]
    count = min(QUERY_BLOCKS, T)
    ends = [T * n // count for n in range(count + 1)]

    def attend_block(start: int, stop: int) -> Array:
        keys = [(k[:, :, :stop], v[:, :, :stop]) for k, v in parts] if causal else parts
        seen = mask
        if seen is not None:
            seen = seen if seen.shape[2] == 1 else seen[:, :, start:stop]
            seen = seen[..., :stop] if causal else seen
        return attend_part(query[:, start:stop], keys, seen)

    return jnp.concatenate([attend_block(i, j) for i, j in itertools.pairwise(ends)], 1)


def _attend_long(
    rule: ScoreRule, in_blocks: bool, query: Array, parts: Sequence[KeysAndValues],
    mask: Array | None,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Attend in blocks of keys; unless `in_blocks`, only where the platform is a TPU."""
    small = functools.partial(_attend_in_blocks, rule, MAX_SCORES_ON_CHIP)
    default = functools.partial(_attend_at_once, rule)
    if in_blocks:
        default = functools.partial(_attend_in_blocks, rule, None)
    return jax.lax.platform_dependent(query, parts, mask, tpu=small, default=default)


def _attend_in_blocks(
    rule: ScoreRule, max_scores: int | None, query: Array, parts: Sequence[KeysAndValues],
    mask: Array | None,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Attend without the scores of all keys in memory; see `blockwise_attention`."""
    key, value = (jnp.concatenate(arrays, 2) for arrays in zip(*parts, strict=True))
    (B, T, N, H), K = query.shape, key.shape[1]
    grouped = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    if mask is not None:
        groups = (1, 1) if mask.shape[1] == 1 else (K, N // K)
        mask = mask.reshape(mask.shape[0], *groups, *mask.shape[2:])
    heads = blockwise_attention.attend(rule, grouped, key, value, mask, max_scores)
    return heads.astype(query.dtype).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _attend_at_once(
    rule: ScoreRule, query: Array, parts: Sequence[KeysAndValues], mask: Array | None,
    pattern: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Attend with all scores in memory."""
    B, T, N, H = query.shape
    K = parts[0][0].shape[1]
    # In this order of axes the products need no transposition of an array of size [T, S].
    grouped = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    products = [
        precision.einsum("BKUH,BKSH->BKUS", grouped, key, into_float32=True) for key, _ in parts
    ]
    scores = rule(_concatenate(products).reshape(B, N, T, -1))
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    odds = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    share = 1 / odds.sum(-1, keepdims=True)
    if mask is not None:
        share = jnp.where(mask.any(-1, keepdims=True), share, 0)
    probabilities = odds * share
    if pattern is not None:
        probabilities = pattern(probabilities)
    probabilities = probabilities.astype(query.dtype).reshape(B, K, N // K * T, -1)
    ends = np.cumsum([key.shape[2] for key, _ in parts])[:-1]
    heads = [
        precision.einsum("BKUS,BKSH->BKUH", part, value)
        for part, (_, value) in zip(jnp.split(probabilities, ends, -1), parts, strict=True)
    ]
    whole = functools.reduce(jnp.add, heads)
    return whole.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _concatenate(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
