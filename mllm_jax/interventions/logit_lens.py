"""The logit lens: the words that the head reads from each token's state, in chunks of tokens.

Each chunk reads the matrix of the head once. On a CPU the logits of a chunk stay in the cache. On
an accelerator chunks are larger, because the products of few tokens are limited by that reading.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.interventions.results import Lens
from mllm_jax.numerics import precision
from mllm_jax.sharding import collectives, mesh
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int

LENS_CHUNK = 128  # tokens whose logits exist at one time on a CPU, and at least elsewhere
LARGEST_CHUNK = 1024  # on an accelerator, and
CHUNK_BYTES = 2**28  # up to this size of their logits
TOP_BLOCK = 128  # values per block, whose maxima `top_k` compares first


def read(
    x: Float[Array, "B T D"],
    selected: Bool[AnyArray, "B T"],
    lens: Callable[[Array], Array],
    k: int,
) -> Lens:
    """Return the lens of the selected tokens.

    The tokens are cut into chunks; chunks without a selected token are not computed.

    Args:
      x: The states.
      selected: The tokens to read.
      lens: A function from states [..., D] to logits float32[..., V].
      k: How many words to name.
    """
    compute = functools.partial(_read, lens=lens, k=k)
    return _in_chunks(compute, lens, x, selected)


def chunk_size(vocab: int, platform: str) -> int:
    """Return the number of tokens whose logits exist at one time.

    Args:
      vocab: The vocabulary size V.
      platform: JAX's name of the platform.
    """
    if platform == "cpu":
        return LENS_CHUNK
    fitting = CHUNK_BYTES // (4 * vocab) // LENS_CHUNK * LENS_CHUNK
    return max(LENS_CHUNK, min(LARGEST_CHUNK, fitting))


def _in_chunks(
    compute: Callable[..., Any],
    lens: Callable[[Array], Array],
    x: Float[Array, "B T D"],
    *more: Any,
) -> Any:
    """Return compute(chunk, x, *more) with the chunk size of the platform of the program."""
    vocab = jax.eval_shape(lens, x[:, :1]).shape[-1]
    small, large = (chunk_size(vocab, platform) for platform in ("cpu", "accelerator"))
    if min(large, x.shape[0] * x.shape[1]) <= small:
        return compute(small, x, *more)
    of_cpu, of_others = (functools.partial(compute, chunk) for chunk in (small, large))
    return jax.lax.platform_dependent(x, *more, cpu=of_cpu, default=of_others)


def _read(
    chunk: int,
    x: Float[Array, "B T D"],
    selected: Bool[AnyArray, "B T"],
    lens: Callable[[Array], Array],
    k: int,
) -> Lens:
    B, T, _ = x.shape
    order, (states, is_selected) = _cut(chunk, selected, x, jnp.asarray(selected))
    _, shards, chunk = is_selected.shape
    n = B * T // shards
    shape = jax.eval_shape(lens, states[0])

    def read_chunk(args):
        states, is_selected = args
        skipped = Lens(
            jnp.full((shards, chunk, k), -1, jnp.int32),
            jnp.zeros((shards, chunk, k), shape.dtype),
            jnp.zeros((shards, chunk), shape.dtype),
        )
        return jax.lax.cond(
            is_selected.any(), lambda: _lens(lens(states), is_selected, k), lambda: skipped
        )

    parts = jax.lax.map(read_chunk, (states, is_selected))
    inverse = jnp.argsort(order, axis=1)

    def unsort(part):
        tail = part.shape[3:]
        flat = part.swapaxes(0, 1).reshape(shards, -1, *tail)[:, :n]
        flat = jnp.take_along_axis(flat, inverse.reshape(shards, n, *(1,) * len(tail)), 1)
        return mesh.constrain(flat.reshape(B, T, *tail), ("B", *(None,) * (1 + len(tail))))

    return jax.tree.map(unsort, parts)


def sum_probabilities(
    x: Float[Array, "B T D"], weights: Float[Array, "B T kinds"], lens: Callable[[Array], Array]
) -> Float[Array, "kinds V"]:
    """Return the probabilities of all words, summed over tokens by kind; see `read`.

    Args:
      x: The states.
      weights: The weight of each token in each kind.
      lens: See `read`.
    """
    compute = functools.partial(_sum_probabilities, lens=lens)
    return _in_chunks(compute, lens, x, weights)


def _sum_probabilities(
    chunk: int,
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T kinds"],
    lens: Callable[[Array], Array],
) -> Float[Array, "kinds V"]:
    _, parts = _cut(chunk, (weights > 0).any(-1), x, weights)
    shape = jax.eval_shape(lens, parts[0][0])

    def add(total, part):
        states, weight = part
        # Tokens that are not counted may be anything, even NaN.
        states = jnp.where((weight > 0).any(-1, keepdims=True), states, 0)

        def added():
            probabilities = jax.nn.softmax(mesh.constrain(lens(states), ("B", None, "V")), -1)
            return total + precision.full_einsum("snk,snV->kV", weight, probabilities)

        return jax.lax.cond((weight > 0).any(), added, lambda: total), None

    nothing = jnp.zeros((weights.shape[-1], shape.shape[-1]), shape.dtype)
    return jax.lax.scan(add, nothing, parts)[0]


def _cut(
    chunk: int, selected: Bool[AnyArray, "B T"], *arrays: Array
) -> tuple[Array, tuple[Array, ...]]:
    """Sort the selected tokens to the front, and cut arrays of tokens into chunks.

    On a mesh each data shard sorts its own tokens, so that none moves.

    Returns:
      The order of the tokens, int[shards, n], and each array [B, T, ...] as
      [chunks, shards, chunk, ...]; the last chunk is padded with zeros.
    """
    B, T = selected.shape
    shards = mesh.shard_count("B", B)
    n = B * T // shards
    chunk = min(chunk, n)
    order = jnp.argsort(~jnp.asarray(selected).reshape(shards, n), axis=1, stable=True)

    def cut(array):
        tail = array.shape[2:]
        at = order.reshape(shards, n, *(1,) * len(tail))
        array = jnp.take_along_axis(array.reshape(shards, n, *tail), at, 1)
        array = jnp.pad(array, ((0, 0), (0, -n % chunk), *((0, 0),) * len(tail)))
        array = array.reshape(shards, -1, chunk, *tail).swapaxes(0, 1)
        return mesh.constrain(array, (None, "B", *(None,) * (array.ndim - 2)))

    return order, tuple(map(cut, arrays))


def _lens(logits: Float[Array, "... V"], is_selected: Bool[Array, ...], k: int) -> Lens:
    logits = mesh.constrain(logits, ("B", None, "V"))
    best, ids = collectives.top_k(logits, k, top_k)
    highest = logits.max(-1)
    shifted = logits - highest[..., None]
    weights = jnp.exp(shifted)
    total = _sum_over_words(weights)
    entropy = jnp.log(total) - _sum_over_words(weights * shifted) / total
    log_probs = best - (highest + jnp.log(total))[..., None]
    return Lens(
        ids=jnp.where(is_selected[..., None], ids.astype(jnp.int32), -1),
        log_probs=jnp.where(is_selected[..., None], log_probs, 0),
        entropy=jnp.where(is_selected, entropy, 0),
    )


def _sum_over_words(x: Float[Array, "... V"]) -> Float[Array, ...]:
    """Return x.sum(-1) as a product with ones, which is vectorised on CPUs."""
    return jnp.matmul(x, jnp.ones(x.shape[-1:], x.dtype), precision=jax.lax.Precision.HIGHEST)


def top_k(x: Float[Array, "... V"], k: int) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Compute `jax.lax.top_k` within the k blocks with the highest maxima, which hold the result.

    As in `jax.lax.top_k`, of equal values the first comes first.
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
