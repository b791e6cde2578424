"""Generation: prefill and decoding in one compiled program, edits at absolute positions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook_results, sites
from mllm_jax.arguments import require_number, require_whole, type_error
from mllm_jax.batch import Batch
from mllm_jax.interventions import binding
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import BoundEdit, Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.receipts import Receipt
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.interventions.tap import Taps
from mllm_jax.models.cache import Cache
from mllm_jax.passes import arguments
from mllm_jax.passes.run import (
    Logits,
    compiled_run,
    logits_at_last,
    shard_edits,
    unshare_patched,
)
from mllm_jax.sharding import memory, mesh
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int

# From this number of tokens on, decoding with separate layers pays for its longer compilation; on a
# CPU, whose memory is not known, up to this number of bytes of weights.
SEPARATE_STEPS = 16
SEPARATE_BYTES_ON_CPU = 2**31
NOT_A_NUMBER = -2  # the id in place of a token whose logits are NaN


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
      tokens: The generated tokens, int32[B, N]; after a stop, the first of the processor's stop
        ids.
      text: One string per row, or None if the batch has no processor.
      receipts: One for each edit, over all tokens that were read: the prompt, and each row's
        generated tokens except the last.
      captures: The captures by name, of the tokens that were read, as `run` returns them of
        `batch`; `generation["name"]` for short.
      batch: The prompts, each followed by the generated tokens that were read, from column T of the
        prompts on; None without captures.
    """

    tokens: Int[AnyArray, "B N"]
    text: list[str] | None
    receipts: tuple[Receipt, ...]
    captures: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch: Batch | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in self.captures:
            known = ", ".join(self.captures) or "none"
            raise KeyError(f"no capture '{name}'; this generation has: {known}")
        return self.captures[name]

    def _repr_html_(self) -> str:
        return notebook_results.generation(self)


def generate(
    model: Model,
    batch: Batch,
    edits: Edits | None = None,
    captures: dict[str, Capture] | None = None,
    *,
    max_new_tokens: int = 32,
    stop: bool = False,
    temperature: float = 0.0,
    key: Array | None = None,
) -> Generation:
    """Continue each row's prompt, greedily or by seeded sampling.

    Only the prompt is read: answers in the batch are ignored.

    An edit has the same meaning as in `run`: its `where` selects absolute positions, and generated
    tokens are of kind answer. So `where=tokens.last` selects the last token of the prompt and
    nothing after it; to steer every step use `where=tokens.generating`, which is `tokens.last |
    tokens.answer`. A mask bool[B, T] selects nothing after the prompt; a value with a token axis
    [B, T, F] continues with that of the row's last prompt token; `per_step` gives each step its own
    strength.

    Args:
      model: See `run`.
      batch: See `run`.
      edits: The edits to apply.
      captures: The captures to return, by name, over the prompt and the generated tokens that were
        read, which are of kind answer. They are computed in one further pass over the whole text,
        with the same edits. Padding, and tokens after the end of a row, are not counted.
      max_new_tokens: The number N of tokens to generate.
      stop: Whether to end a row at one of `processor.stop_ids`, as transformers does, and the whole
        batch when every row has ended.
      temperature: 0 is greedy; above 0, tokens are sampled and `key` is needed.
      key: A `jax.random.key`.

    Raises:
      ValueError: A row holds several questions; an edit does not fit, see `run`; or logits are
        NaN.
    """
    arguments.check(model, batch, edits, captures)
    max_new_tokens = require_whole("max_new_tokens", max_new_tokens)
    _check_sampling(temperature, key)
    if not isinstance(stop, bool | np.bool_):
        raise type_error("stop", stop, "True, to end at one of processor.stop_ids, or False")
    processor, batch = batch.processor, batch.prompts().replace(processor=None)
    batch = unshare_patched(model, batch, edits)
    if stop and processor is None:
        raise ValueError("stop=True needs a batch made by a processor, which knows the stop token")
    if stop and not len(processor.stop_ids):
        raise ValueError(
            "stop=True, but the checkpoint has no token to stop at: set eos_token_id in its "
            "generation_config.json"
        )
    bound = binding.bind_continuation(model, batch, edits, max_new_tokens)
    stops = processor.stop_ids if stop else np.full((1,), -1, np.int32)
    with mesh.use_mesh_of(model):
        outputs = compiled_generate(
            model, mesh.shard_batch(batch), shard_edits(bound), stops, np.float32(temperature or 1),
            key if temperature else None, steps=max_new_tokens, greedy=not temperature,
            separate_layers=_separates_layers(model, batch, max_new_tokens),
        )  # fmt: skip
        tokens, receipts = mesh.gather_to_host(outputs)
    _check_no_nan(tokens)
    text = None if processor is None else processor.text(tokens, stop=stop)
    if not captures:
        return Generation(tokens, text, receipts)
    whole = batch.followed_by(tokens[:, :-1], _was_read(tokens[:, :-1], stops))
    results = _capture(model, batch, whole, edits, captures)
    return Generation(tokens, text, receipts, results, whole.replace(processor=processor))


def _check_sampling(temperature: float, key: Array | None) -> None:
    """Raise ValueError unless tokens can be sampled at this temperature with this key."""
    if not require_number("temperature", temperature):
        return
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_raw = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32
    if key is None or not (is_key or is_raw) or key.ndim != (1 if is_raw else 0):
        raise ValueError("sampling needs one key: key=jax.random.key(seed)")


def _capture(
    model: Model, prompts: Batch, whole: Batch, edits: Edits | None, captures: dict[str, Capture]
) -> dict[str, Any]:
    """Return captures of prompts and generated tokens, under the edits of a generation."""
    bound_captures = binding.bind_captures(
        captures, site_shapes(model, whole), model.token_maps(whole), edits
    )
    steps = whole.ids.shape[1] - prompts.ids.shape[1]
    bound = binding.bind_continuation(model, prompts, edits, steps)
    logits: Logits = "all"
    if all(capture.site != sites.logits for capture in bound_captures.values()):
        logits, bound = "none", tuple(edit for edit in bound if edit.site != sites.logits)
    with mesh.use_mesh_of(model):
        inputs = mesh.shard_batch(whole), shard_edits(bound), bound_captures
        out = mesh.gather_to_host(compiled_run(model, *inputs, logits=logits, remat=False))
    return out.captures


def _was_read(tokens: Int[AnyArray, "B n"], stops: Int[np.ndarray, " k"]) -> Bool[AnyArray, "B n"]:
    """Return which generated tokens were read: those before a stop."""
    ended = (tokens[..., None] == stops).any(-1)
    return ended.cumsum(-1) == 0


def _check_no_nan(tokens: Int[AnyArray, "B N"]) -> None:
    """Raise an error if logits were NaN, unless values are traced."""
    if isinstance(tokens, jax.core.Tracer):
        return
    wrong = np.argwhere(np.asarray(tokens) == NOT_A_NUMBER)
    if len(wrong):
        row, step = wrong[wrong[:, 1].argmin()]
        raise ValueError(
            f"row {row}: the logits of its generated token {step} are NaN, so no token can be "
            "chosen: run(model, batch, edits, check_finite=True) finds the first site with NaN"
        )


def separates_layers(
    platform: str, rows: int, steps: int, weights: int, cache: int, free: int | None
) -> bool:
    """Return whether decoding reads the layers from separate arrays.

    A scan over layers slices each layer's weights from the stacked arrays. A GPU writes the slice
    and reads it again in the product, three times the bytes that a token needs; separate arrays are
    read in place, but they are a second copy of the language model during decoding. A TPU reads
    slices in place. A CPU is faster with separate layers for a single row alone: with four rows or
    more the scan takes a quarter less time per token.

    Args:
      platform: JAX's name of the platform.
      rows: The number of rows.
      steps: The number of tokens to generate.
      weights: The bytes of the language model on one device.
      cache: The bytes of the keys and values of all tokens on one device.
      free: The bytes of a device's memory that the model leaves free; None if they are unknown.
    """
    if steps < SEPARATE_STEPS or platform == "tpu":
        return False
    if platform == "cpu":
        return rows == 1 and weights <= SEPARATE_BYTES_ON_CPU and not mesh.is_active()
    return free is not None and weights + 2 * cache <= free // 2  # the prompt has a cache too


def _separates_layers(model: Model, batch: Batch, steps: int) -> bool:
    """Return `separates_layers` on the devices of a model; False while it is traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model)):
        return False
    rows, slots = batch.ids.shape[0], batch.ids.shape[1] + steps - 1
    return separates_layers(
        memory.first_device(model).platform, rows, steps, memory.bytes_on_device(model.lm),
        Cache.bytes_on_device(model.config.lm, rows, slots, model.lm.norm.scale.dtype),
        memory.free_bytes(model),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("steps", "greedy", "separate_layers"))
def compiled_generate(
    model: Model,
    batch: Batch,
    edits: tuple[BoundEdit, ...],
    stops: Int[Array, " n"],
    temperature: Float[Array, ""],
    key: Array | None,
    *,
    steps: int,
    greedy: bool,
    separate_layers: bool = False,
) -> tuple[Int[Array, "B N"], tuple[Receipt, ...]]:
    """Prefill and decode; see `generate` and `separates_layers`."""
    B, T = batch.ids.shape
    taps = Taps(edits)
    x, cache = model(batch, taps)
    logits = logits_at_last(model, batch, x, taps)
    receipts = taps.receipt_list()

    def append(logits, step, done, tokens):
        """Append a token to each row; return it with the rows that have ended, and all tokens."""
        own = None
        if not greedy:
            assert key is not None, "sampling needs a key"
            own = jax.random.fold_in(key, step)
        token = jnp.where(done, stops[0], _choose(logits, temperature, own))
        done = done | (token[:, None] == stops).any(-1)
        return token, done, tokens.at[:, step].set(token)

    def unfinished(state):
        step, _, _, done, *_ = state
        return (step < steps) & ~done.all()

    layers = model.lm.layers_one_by_one() if separate_layers else None

    def advance(state):
        step, cache, token, done, tokens, receipts = state
        at = T + step - 1
        taps = Taps(_restrict_to_rows(edits, ~done), at=at)
        word, valid = embed_words(model, token[:, None], taps), jnp.ones((B, 1), bool)
        positions = batch.positions.after(batch.last, step[None], valid)
        x, new = model.read(word, positions, taps, cache, layers=layers)
        token, done, tokens = append(model.logits(x, taps)[:, 0], step, done, tokens)
        receipts = _add_receipts(receipts, taps)
        return step + 1, cache.write(new, at), token, done, tokens, receipts

    empty = ~jnp.asarray(batch.valid_row)
    start = append(logits, 0, empty, jnp.full((B, steps), stops[0]))
    state = (jnp.int32(1), cache.extended(steps - 1), *start, receipts)

    *_, tokens, receipts = jax.lax.while_loop(unfinished, advance, state)
    return tokens, receipts


def _choose(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], key: Array | None
) -> Int[Array, " B"]:
    """Return the next token of each row, the most probable one without a key."""
    token = logits.argmax(-1)
    if key is not None:
        token = jax.random.categorical(key, logits / temperature)
    return jnp.where(jnp.isnan(logits).any(-1), NOT_A_NUMBER, token.astype(jnp.int32))


def embed_words(model: Model, ids: Int[Array, "B T"], taps: Taps) -> Float[Array, "B T D"]:
    """Embed the words that follow a prompt, without images."""
    return taps.module("lm")(sites.lm.embed, model.lm.embeddings(ids))


def _restrict_to_rows(
    edits: tuple[BoundEdit, ...], rows: Bool[Array, " B"]
) -> tuple[BoundEdit, ...]:
    """Return the edits in only these rows: rows that have ended are no longer counted."""

    def restrict(edit):
        if edit.site.module not in ("lm", "logits"):
            return edit  # the pass does not reach its site after the prompt
        return dataclasses.replace(edit, tokens=edit.tokens & rows[:, None])

    return tuple(restrict(edit) for edit in edits)


def _add_receipts(receipts: tuple[Receipt, ...], taps: Taps) -> tuple[Receipt, ...]:
    """Add the receipts of a pass without vision, which may not reach all sites."""

    def add(number: int, old: Receipt) -> Receipt:
        if number not in taps.receipts:
            return old
        tokens, elements, norm = taps.receipts[number]
        norm = jnp.sqrt(old.norm**2 + norm**2)
        return Receipt(old.edit, old.tokens + tokens, old.elements + elements, norm)

    return tuple(add(number, old) for number, old in enumerate(receipts))
