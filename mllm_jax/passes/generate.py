"""Generation: prefill and decoding in one compiled program, edits at absolute positions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites
from mllm_jax.interventions import binding
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.receipts import Receipt
from mllm_jax.interventions.tap import Taps
from mllm_jax.passes import run as run_
from mllm_jax.sharding import mesh

NOT_A_NUMBER = -2  # in the place of a token whose logits are NaN


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
      tokens: int32[B, N]; after a stop, the first of the processor's stop ids.
      text: a string a row, or None where the batch knows no processor.
      receipts: of each edit over all that was read: the prompt, and each row's generated tokens
        but the last, after which there is nothing to choose.
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

    The prompt alone is read: answers that the batch holds are not seen.

    An edit means the same as in `run`: its `where` is taken at absolute positions, and what is
    generated is of kind answer. So `where=tokens.last` is the last token of the prompt and nothing
    after it; to steer every step use `where=tokens.generating`, which is `tokens.last |
    tokens.answer`. A mask bool[B, T] selects nothing after the prompt; a value with a token axis
    [B, T, F] goes on with that of the row's last prompt token; `per_step` gives each step a
    strength of its own.

    Args:
      max_new_tokens: N.
      stop: end a row at one of `processor.stop_ids`, where transformers stops, and all when every
        row has ended.
      temperature: 0 is greedy; above, tokens are sampled and `key` is needed.
      key: a `jax.random.key`.

    Raises:
      ValueError: a row holds several questions; an edit does not fit, see `run`; or logits are
        NaN.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: one or more can be generated")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0")
    if temperature and key is None:
        raise ValueError("sampling needs key=jax.random.key(seed)")
    processor, batch = batch.processor, batch.prompts().replace(processor=None)
    batch = run_.separate(model, batch, edits)
    if stop and processor is None:
        raise ValueError("stop=True needs a batch made by a processor, which knows the stop token")
    if stop and not len(processor.stop_ids):
        raise ValueError(
            "stop=True, but the checkpoint names no token to stop at: set eos_token_id in its "
            "generation_config.json"
        )
    bound = bind(model, batch, edits, max_new_tokens)
    stops = processor.stop_ids if stop else np.full((1,), -1, np.int32)
    with mesh.use_mesh_of(model):
        found = _generate(
            model, mesh.shard_batch(batch), run_.place(bound), stops, np.float32(temperature or 1),
            key if temperature else None, steps=max_new_tokens, greedy=not temperature,
        )  # fmt: skip
        tokens, receipts = mesh.gather_to_host(found)
    _refuse_not_a_number(tokens)
    text = None if processor is None else processor.text(tokens, stop=stop)
    return Generation(tokens, text, receipts)


def _refuse_not_a_number(tokens) -> None:
    if isinstance(tokens, jax.core.Tracer):
        return
    wrong = np.argwhere(np.asarray(tokens) == NOT_A_NUMBER)
    if len(wrong):
        row, step = wrong[wrong[:, 1].argmin()]
        raise ValueError(
            f"row {row}: the logits of its generated token {step} are NaN, so there is none to "
            "choose: run(model, batch, edits, check_finite=True) names the first site with NaN"
        )


def bind(model, batch, edits: Edits | None, steps: int) -> tuple[edits_.BoundEdit, ...]:
    """Edits bound to the prompt and `steps` tokens after it."""
    if not edits:
        return ()
    maps = model.token_maps(batch)
    maps |= {name: maps[name].extended(steps) for name in ("lm", "logits")}
    bound = binding.bind(edits, run_.site_shapes(model, batch), maps)
    binding.refuse_uncomputed(bound, batch.last, batch.ids.shape[1])
    return tuple(_continued(edit, batch.last, steps) for edit in bound)


def _continued(edit: edits_.BoundEdit, last, steps: int) -> edits_.BoundEdit:
    """Values with a token axis go on after the prompt with the value at its last token."""
    site = edit.site
    if site.module not in ("lm", "logits"):
        return edit
    axis, rank = 1 + edits_.token_axis(site), 1 + len(site.axes)

    def longer(value):
        if value.ndim != rank or value.shape[axis] == 1:
            return value
        xp = np if isinstance(value, np.ndarray) and isinstance(last, np.ndarray) else jnp
        at = last.reshape(1, -1, *(1,) * (rank - 2))
        by_row = xp.broadcast_to(value, (value.shape[0], at.shape[1], *value.shape[2:]))
        end = xp.take_along_axis(by_row, at, axis)
        return xp.concatenate([by_row, xp.repeat(end, steps, axis)], axis)

    if "S" in site.axes and any(v.ndim == rank and v.shape[-1] > 1 for v in edit.values.values()):
        raise ValueError(
            f"{edit.kind} {site.name}: a value with the axis S is of the prompt's keys, and in "
            "generation there come more; give one without (1 in its place)"
        )
    return dataclasses.replace(edit, values=jax.tree.map(longer, edit.values))


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
            chosen = logits.argmax(-1)
        else:
            chosen = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)
        return jnp.where(jnp.isnan(logits).any(-1), NOT_A_NUMBER, chosen.astype(jnp.int32))

    def say(logits, step, done, tokens):
        """One more token in each row, and which rows have ended with it."""
        token = jnp.where(done, stops[0], choose(logits, step))
        done = done | (token[:, None] == stops).any(-1)
        return token, done, tokens.at[:, step].set(token)

    def unfinished(state):
        step, _, _, done, *_ = state
        return (step < steps) & ~done.all()

    def advance(state):
        step, cache, token, done, tokens, receipts = state
        at = T + step - 1
        taps = Taps(_only(edits, ~done), at=at)
        word, seen = words(model, token[:, None], taps), jnp.ones((B, 1), bool)
        x, new = model.read(word, first + step, seen, taps, cache)
        token, done, tokens = say(model.logits(x, taps)[:, 0], step, done, tokens)
        receipts = tuple(
            old if new is None else _sum(old, new)
            for old, new in zip(receipts, _found(taps), strict=True)
        )
        return step + 1, cache.write(new, at), token, done, tokens, receipts

    empty = ~jnp.asarray(batch.valid).any(-1)
    said = say(logits, 0, empty, jnp.full((B, steps), stops[0]))
    state = (1, cache.extended(steps - 1), *said, receipts)
    *_, tokens, receipts = jax.lax.while_loop(unfinished, advance, state)
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
