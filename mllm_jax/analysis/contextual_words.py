"""Nearest contextual words: the words in texts whose states are most similar to a state.

A logit lens gives the words of the vocabulary that a state predicts. LatentLens (Krojer et al.
2026, "LatentLens: Revealing Highly Interpretable Visual Tokens in LLMs") gives instead its nearest
neighbours, by cosine similarity, among the states of words in given texts, at all layers together.
An image token of an early layer is often nearest to words of a middle one. Nothing is trained.

    captures = {"x": mj.keep(S.lm.resid_post[[0, 8, 16, 24]], where=tok.question)}
    x = mj.run(model, processor(None, texts), None, captures, logits="none")["x"]  # [L, B, T, D]
    found = nearest(states, x[:, mask].reshape(-1, D), k=5)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.analysis import checks
from mllm_jax.arguments import require_whole
from mllm_jax.typing import AnyArray, Array, Float, Int

CHUNK = 256  # states whose cosines with all words exist at one time


class Neighbours(NamedTuple):
    """The nearest words of each state, the nearest first; ties in the order of the bank.

    Attributes:
      words: The rows of the bank, int32[n, k].
      cosine: Their cosines with the state, float32[n, k]; 0 with a state of zeros.
    """

    words: Int[np.ndarray, "n k"]
    cosine: Float[np.ndarray, "n k"]


def nearest(states: Float[AnyArray, "n D"], bank: Float[AnyArray, "m D"], k: int = 5) -> Neighbours:
    """Find the nearest words of each state.

    Args:
      states: The states to describe, such as those of image tokens at one layer.
      bank: The states of words in texts, of any layers.
      k: How many words to name.

    Raises:
      ValueError: The widths differ, a state is not finite, or the bank holds fewer than k words.
    """
    states = checks.finite(states, "states", axes="[n, D]")
    bank = checks.finite(bank, "bank", axes="[m, D]")
    if states.shape[1] != bank.shape[1]:
        raise ValueError(
            f"states are {states.shape} and the bank is {bank.shape}: their widths must be equal"
        )
    k = require_whole("k", k, least=1)
    if k > len(bank):
        raise ValueError(f"k={k}: the bank holds {len(bank)} words")
    if not len(states):
        return Neighbours(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
    cosine, words = _nearest(_unit(states), _unit(bank), k=k)
    return Neighbours(np.asarray(words), np.asarray(cosine))


@functools.partial(jax.jit, static_argnames=("k",))
def _nearest(states: Float[Array, "n D"], bank: Float[Array, "m D"], *, k: int):
    def of_state(state):
        cosine = jnp.matmul(bank, state, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.top_k(cosine, k)

    return jax.lax.map(of_state, states, batch_size=CHUNK)


def _unit(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Return rows of norm 1, float32; rows of zeros are unchanged."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.where(length > 0, length, 1)).astype(np.float32)
