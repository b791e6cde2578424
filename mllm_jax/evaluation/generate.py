"""Generation: prefill and decoding in one compiled program, edits at absolute positions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions import run as run_
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.receipts import Receipt
from mllm_jax.interventions.tap import Taps


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
      tokens: int32[B, N]; after a stop, the stop token again.
      text: a string a row, or None where the batch knows no processor.
      receipts: of each edit over prompt and generated tokens together.
    """

    tokens: Any
    text: list[str] | None
    receipts: tuple[Receipt, ...]


def generate(
    model,
    batch,
    edits: Edits | None = None,
    *,
    max_new_tokens: int = 32,
    stop: bool = False,
    temperature: float = 0.0,
    key=None,
) -> Generation:
    """Continue each row's prompt, greedily or by seeded sampling.

    An edit means the same as in `run`: its `where` is taken at absolute positions, and what is
    generated is of kind answer.

    Args:
      max_new_tokens: N.
      stop: end a row at the end of its turn, and all when every row has ended.
      temperature: 0 is greedy; above, tokens are sampled and `key` is needed.
      key: a `jax.random.key`.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0")
    if temperature and key is None:
        raise ValueError("sampling needs key=jax.random.key(seed)")
    processor, batch = batch.processor, batch.replace(processor=None)
    if stop and processor is None:
        raise ValueError("stop=True needs a batch made by a processor, which knows the stop token")
    bound = bind(model, batch, edits, max_new_tokens)
    stops = processor.stop_ids if stop else np.full((1,), -1, np.int32)
    tokens, receipts = _generate(
        model, batch, bound, stops, np.float32(temperature or 1),
        key if temperature else jax.random.key(0), steps=max_new_tokens, greedy=not temperature,
    )  # fmt: skip
    text = None if processor is None else processor.text(tokens, stop=stop)
    return Generation(tokens, text, receipts)


def bind(model, batch, edits: Edits | None, steps: int) -> tuple[edits_.BoundEdit, ...]:
    """Edits bound to the prompt and `steps` tokens after it."""
    if not edits:
        return ()
    maps = model.token_maps(batch)
    maps |= {name: maps[name].extended(steps) for name in ("lm", "logits")}
    return edits_.bind(edits, run_.site_shapes(model, batch), maps)


@functools.partial(jax.jit, static_argnames=("steps", "greedy"))
def _generate(model, batch, edits, stops, temperature, key, *, steps, greedy):
    B, T = batch.ids.shape
    taps = Taps(edits)
    x, cache = model(batch, taps)
    logits = run_.at_last(model, batch, x, taps)
    receipts = taps.receipt_list()
    first = jnp.take_along_axis(jnp.asarray(batch.position), batch.last[:, None], 1)

    def choose(logits, step):
        if greedy:
            return logits.argmax(-1).astype(jnp.int32)
        chosen = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)
        return chosen.astype(jnp.int32)

    def unfinished(state):
        step, _, _, _, done, _ = state
        return (step < steps) & ~done.all()

    def advance(state):
        step, cache, logits, tokens, done, receipts = state
        token = jnp.where(done, stops[0], choose(logits, step))
        tokens = tokens.at[:, step].set(token)
        taps = Taps(_only(edits, ~done), at=T + step)
        done = done | (token[:, None] == stops).any(-1)
        word, seen = words(model, token[:, None], taps), jnp.ones((B, 1), bool)
        x, new = model.read(word, first + 1 + step, seen, taps, cache)
        logits = model.logits(x, taps)[:, 0]
        receipts = tuple(
            old if new is None else _sum(old, new)
            for old, new in zip(receipts, _found(taps), strict=True)
        )
        return step + 1, cache.write(new, T + step), logits, tokens, done, receipts

    rows = jnp.asarray(batch.valid).any(-1)
    state = (0, cache.extended(steps), logits, jnp.full((B, steps), stops[0]), ~rows, receipts)
    *_, tokens, _, receipts = jax.lax.while_loop(unfinished, advance, state)
    return tokens, receipts


def words(model, ids, taps: Taps):
    """Embeddings of words that follow the prompt: no image is among them."""
    return taps.module("lm")(sites.lm.embed, model.lm.embeddings(ids))


def _only(edits: tuple[edits_.BoundEdit, ...], rows) -> tuple[edits_.BoundEdit, ...]:
    """The edits in these rows alone: a row that has ended counts no more."""

    def one(edit):
        if edit.site.module not in ("lm", "logits"):
            return edit  # not met after the prompt
        return dataclasses.replace(edit, tokens=edit.tokens & rows[:, None])

    return tuple(one(edit) for edit in edits)


def _found(taps: Taps) -> list[Receipt | None]:
    """Receipts of a pass that does not run through every site (no vision after the prompt)."""
    return [
        Receipt(f"{edit.kind} {edit.site.name}", *taps.receipts[i]) if i in taps.receipts else None
        for i, edit in enumerate(taps.edits)
    ]


def _sum(a: Receipt, b: Receipt) -> Receipt:
    return Receipt(
        a.edit, a.tokens + b.tokens, a.elements + b.elements, jnp.sqrt(a.norm**2 + b.norm**2)
    )
