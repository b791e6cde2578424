"""The logit lens: what each token's state says through the head, in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.interventions.results import Lens
from mllm_jax.sharding import collectives, mesh

LENS_CHUNK = 128  # tokens whose logits exist at one time
TOP_BLOCK = 128  # values that are looked at together for the highest


def read(x: jax.Array, selected: Any, lens: Callable[[jax.Array], jax.Array], k: int) -> Lens:
    """The lens of the selected tokens.

    These come first, in chunks; chunks without a selected token are not computed. On a mesh each
    data shard orders its own tokens, so that none moves.

    Args:
      x: float[B, T, D], states. selected: bool[B, T].
      lens: turns states [..., D] into logits float32[..., V].
      k: how many words.
    """
    B, T, D = x.shape
    shards = mesh.shard_count("B", B)
    n = B * T // shards
    mask = jnp.asarray(selected).reshape(shards, n)
    chunk = min(LENS_CHUNK, n)
    fill = -n % chunk
    order = jnp.argsort(~mask, axis=1, stable=True)

    def chunks(array):  # [shards, n, ...] -> [chunks, shards, chunk, ...]
        tail = array.shape[2:]
        at = order.reshape(shards, n, *(1,) * len(tail))
        array = jnp.take_along_axis(array, at, 1)
        array = jnp.pad(array, ((0, 0), (0, fill), *((0, 0),) * len(tail)))
        array = array.reshape(shards, -1, chunk, *tail).swapaxes(0, 1)
        return mesh.constrain(array, (None, "B", *(None,) * (array.ndim - 2)))

    states, chosen = chunks(x.reshape(shards, n, D)), chunks(mask)
    shape = jax.eval_shape(lens, states[0])

    def one(args):
        states, chosen = args
        skipped = Lens(
            jnp.full((shards, chunk, k), -1, jnp.int32),
            jnp.zeros((shards, chunk, k), shape.dtype),
            jnp.zeros((shards, chunk), shape.dtype),
        )
        return jax.lax.cond(chosen.any(), lambda: _lens(lens(states), chosen, k), lambda: skipped)

    parts = jax.lax.map(one, (states, chosen))
    inverse = jnp.argsort(order, axis=1)

    def unsort(part):
        tail = part.shape[3:]
        flat = part.swapaxes(0, 1).reshape(shards, -1, *tail)[:, :n]
        flat = jnp.take_along_axis(flat, inverse.reshape(shards, n, *(1,) * len(tail)), 1)
        return mesh.constrain(flat.reshape(B, T, *tail), ("B", *(None,) * (1 + len(tail))))

    return jax.tree.map(unsort, parts)


def _lens(logits, chosen, k: int) -> Lens:
    logits = mesh.constrain(logits, ("B", None, "V"))
    best, ids = collectives.top_k(logits, k, top_k)
    highest = logits.max(-1)
    below = logits - highest[..., None]
    odds = jnp.exp(below)
    total = _over_words(odds)
    entropy = jnp.log(total) - _over_words(odds * below) / total
    log_probs = best - (highest + jnp.log(total))[..., None]
    return Lens(
        ids=jnp.where(chosen[..., None], ids.astype(jnp.int32), -1),
        log_probs=jnp.where(chosen[..., None], log_probs, 0),
        entropy=jnp.where(chosen, entropy, 0),
    )


def _over_words(x):
    """x.sum(-1), as a product with ones: a CPU adds up in it eight numbers at a time."""
    return jnp.matmul(x, jnp.ones(x.shape[-1:], x.dtype), precision=jax.lax.Precision.HIGHEST)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`, by way of the k blocks with the highest maxima: they hold all the best.

    Of equal values the first is taken, as there.
    """
    blocks = -(-x.shape[-1] // TOP_BLOCK)
    if blocks <= 2 * k:
        return jax.lax.top_k(x, k)
    fill = [(0, 0)] * (x.ndim - 1) + [(0, blocks * TOP_BLOCK - x.shape[-1])]
    x = jnp.pad(x, fill, constant_values=-jnp.inf).reshape(*x.shape[:-1], blocks, TOP_BLOCK)
    block = jnp.sort(jax.lax.top_k(x.max(-1), k)[1])
    candidates = jnp.take_along_axis(x, block[..., None], -2)
    best, at = jax.lax.top_k(candidates.reshape(*block.shape[:-1], -1), k)
    return best, jnp.take_along_axis(block, at // TOP_BLOCK, -1) * TOP_BLOCK + at % TOP_BLOCK
