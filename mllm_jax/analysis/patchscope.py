"""Patchscopes: put a state into another prompt and let the model put it into words.

A logit lens reads one word from a state by the head alone. A patchscope (Ghandeharioun et al. 2024,
"Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language Models") puts
the state of a token, such as an image token at some layer, in place of a token of a target prompt,
at the same layer or another, and lets the model continue. The prompt of the paper asks the model to
repeat a token:

    target = processor(None, [IDENTITY])
    at = place(target, "?")
    said = say(model, states, target, layer=8, where=at, max_new_tokens=5)       # states [n, D]
    said.text, next_words(model, states, target, layer=8, where=at).log_probs    # float32[n, k]

A state may be mapped before it is put there, by a tuned lens or any other function of the caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.analysis import checks
from mllm_jax.arguments import require_whole
from mllm_jax.batch import Batch
from mllm_jax.interventions import edits
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.passes.generate import generate
from mllm_jax.passes.run import run
from mllm_jax.tokens import Selector
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int

IDENTITY = "cat -> cat; 1135 -> 1135; hello -> hello; ?"


class Said(NamedTuple):
    """What the model says about each state.

    Attributes:
      tokens: The generated tokens, int32[n, N].
      text: The same as text, one string per state; None if the batch has no processor.
    """

    tokens: Int[np.ndarray, "n N"]
    text: list[str] | None


class NextWords(NamedTuple):
    """The most probable next words after the prompt with each state, the most probable first.

    Attributes:
      ids: Their ids, int32[n, k].
      log_probs: Their log-probabilities, float32[n, k].
    """

    ids: Int[np.ndarray, "n k"]
    log_probs: Float[np.ndarray, "n k"]


def place(target: Batch, text: str = "?") -> Bool[np.ndarray, "1 T"]:
    """Return where a state is put: the last token of the question that contains a text.

    Args:
      target: The target prompt, a batch of one row by a processor.
      text: A part of the text of that token.

    Raises:
      ValueError: The batch does not have one row made by a processor, or no token contains the
        text.
    """
    _check_target(target)
    if target.processor is None:
        raise ValueError("the target has no processor: give where= a mask bool[1, T] instead")
    ids, is_question = np.asarray(target.ids)[0], np.asarray(tokens.question.mask(target.tokens))[0]
    at = [i for i in np.flatnonzero(is_question) if text in target.processor.word(int(ids[i]))]
    if not at:
        words = [target.processor.word(int(i)) for i in ids[is_question]]
        raise ValueError(f"no token of the target has {text!r} in it; they are {words!s:.200}")
    return np.arange(len(ids))[None] == at[-1]


def say(
    model: Model,
    states: Float[AnyArray, "n D"],
    target: Batch,
    *,
    layer: int | Int[AnyArray, " n"],
    where: Selector = tokens.last,
    max_new_tokens: int = 8,
    rows: int = 64,
) -> Said:
    """Generate what the model says after a prompt with each state in it.

    Args:
      model: See `run`.
      states: The states, such as `lm.resid_post` of image tokens at some layer.
      target: The target prompt, a batch of one row.
      layer: The layer of the target's pass after which a state is put there, for all states or one
        for each. All layers share one program.
      where: The tokens that are replaced by the state, see `place`; by default the last of the
        prompt.
      max_new_tokens: The number N of tokens to generate, greedily.
      rows: The number of states that are read at one time.

    Raises:
      ValueError: The target does not have one row, `where` selects none of its tokens, the states
        are not finite or have another width, or a layer is out of range.
    """

    def read(batch: Batch, put: Edits) -> tuple[Int[AnyArray, "B N"]]:
        return (generate(model, batch, put, max_new_tokens=max_new_tokens).tokens,)

    (found,) = _read(model, states, target, layer, where, rows, read)
    text = None if target.processor is None else target.processor.text(found, stop=True)
    return Said(found, text)


def next_words(
    model: Model,
    states: Float[AnyArray, "n D"],
    target: Batch,
    *,
    layer: int | Int[AnyArray, " n"],
    where: Selector = tokens.last,
    k: int = 5,
    rows: int = 64,
) -> NextWords:
    """Return the most probable words after a prompt with each state in it.

    Args:
      model: See `run`.
      states: See `say`.
      target: See `say`.
      layer: See `say`.
      where: See `say`.
      k: How many words to name.
      rows: See `say`.

    Raises:
      ValueError: See `say`; or there are fewer than k words.
    """
    k = require_whole("k", k, least=1)

    def read(batch: Batch, put: Edits) -> tuple[Array, Array]:
        logits = run(model, batch, put).logits
        assert logits is not None, "a pass computes the logits of the last token"
        if k > logits.shape[-1]:
            raise ValueError(f"k={k}: the vocabulary has {logits.shape[-1]} words")
        return _top(logits, k=k)

    return NextWords(*_read(model, states, target, layer, where, rows, read))


@functools.partial(jax.jit, static_argnames=("k",))
def _top(logits: Float[Array, "B V"], *, k: int) -> tuple[Array, Array]:
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32)), k)
    return ids, log_probs


def _read(
    model: Model,
    states: Float[AnyArray, "n D"],
    target: Batch,
    layer: int | Int[AnyArray, " n"],
    where: Selector,
    rows: int,
    read: Callable[[Batch, Edits], tuple[AnyArray, ...]],
) -> list[np.ndarray]:
    """Return what is read from the target with each state in it, in the order of the states."""
    states = checks.finite(states, "states", axes="[n, D]").astype(np.float32)
    _check_target(target)
    spec = look_up(S.lm.resid_post, site_shapes(model, target.replace(processor=None)))
    if states.shape[1] != spec.shape[-1] or not len(states):
        raise ValueError(
            f"states are {list(states.shape)}, expected [n, {spec.shape[-1]}], one or more"
        )
    layers = _layers(layer, len(states), spec.layers)
    at = np.asarray(tokens.of(where).mask(target.tokens))
    rows = min(require_whole("rows", rows, least=1), len(states))
    batch = target.take(np.zeros(rows, int)).replace(processor=None)
    parts: list[tuple[np.ndarray, ...]] = []
    order: list[Int[np.ndarray, " m"]] = []
    for chosen in _chunks(layers, rows):
        value = states[np.resize(chosen, rows)][None, :, None]  # the last chunk repeats its states
        put = edits.replace(
            S.lm.resid_post[layers[chosen[0]]], value, where=tokens.mask(np.repeat(at, rows, 0))
        )
        parts.append(tuple(np.asarray(a)[: len(chosen)] for a in read(batch, put)))
        order.append(chosen)
    back = np.argsort(np.concatenate(order))
    return [np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True)]


def _chunks(layers: Int[np.ndarray, " n"], rows: int) -> Iterator[Int[np.ndarray, " m"]]:
    """Yield the numbers of up to `rows` states of one layer."""
    for layer in np.unique(layers):
        of_layer = np.flatnonzero(layers == layer)
        for start in range(0, len(of_layer), rows):
            yield of_layer[start : start + rows]


def _layers(layer: int | Int[AnyArray, " n"], states: int, count: int) -> Int[np.ndarray, " n"]:
    layers = np.asarray(layer)
    if not np.issubdtype(layers.dtype, np.integer) or layers.shape not in ((), (states,)):
        raise ValueError(f"layer= is one integer, or one for each of the {states} states")
    if ((layers < -count) | (layers >= count)).any():
        raise ValueError(f"layer={layer!s:.60}: the language model has {count}, 0 to {count - 1}")
    return np.broadcast_to(layers % count, (states,))


def _check_target(target: Batch) -> None:
    if len(target.ids) != 1:
        raise ValueError(
            f"the target has {len(target.ids)} rows: give one prompt, processor(None, [prompt])"
        )
