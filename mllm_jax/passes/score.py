"""Scoring: the log-likelihood of candidate answers, with a single pass over the prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.interventions import binding
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import BoundEdit, Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.receipts import Receipt
from mllm_jax.interventions.tap import Taps
from mllm_jax.passes import arguments
from mllm_jax.passes.generate import embed_words
from mllm_jax.passes.run import logits_at_last, shard_edits, unshare_patched
from mllm_jax.processors.prompts import as_list
from mllm_jax.sharding import collectives, mesh
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int

CHUNK_TOKENS = 512  # tokens of candidates, over all rows, whose logits exist at one time


class Tokenizing(Protocol):
    """The method of a processor that scoring needs."""

    def answer_ids(self, text: str, *, end: bool = True) -> list[int]:
        """Return an answer as token ids, with the end of its turn unless `end` is False."""


# Strings, lists of strings, or token ids.
Candidates: TypeAlias = Sequence[str] | Sequence[Sequence[str]] | AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """The results of scoring.

    Attributes:
      values: The natural log-likelihood of each candidate, float32[B, C].
      captures: The captures of the prompt, by name.
      receipts: One for each edit, over the prompt.
    """

    values: Float[Array, "B C"]
    captures: dict[str, Any]
    receipts: tuple[Receipt, ...]


def score(
    model: Model, batch: Batch, candidates: Candidates, edits: Edits | None = None
) -> Float[Array, "B C"]:
    """Compute the natural log-likelihood of each candidate answer, including its end of turn.

    Only the prompt is read: answers in the batch are ignored.

    Args:
      model: See `run`.
      batch: See `run`.
      candidates: C strings for all rows; a list of strings for each row, where missing candidates
        of shorter lists get -inf; or token ids int32[B, C, A], padded with -1. Rows that only fill
        up the batch need none.
      edits: The edits of the prompt and of the candidates, whose tokens are of kind answer.

    Raises:
      ValueError: The candidates have another form, or one is empty; a row has none, or holds
        several questions; or an edit does not fit.
    """
    return score_with(model, batch, candidates, edits).values


def score_with(
    model: Model,
    batch: Batch,
    candidates: Candidates,
    edits: Edits | None = None,
    captures: dict[str, Capture] | None = None,
) -> Scores:
    """Compute `score`, with captures and receipts of the prompt."""
    arguments.check(model, batch, edits, captures)
    processor, batch = batch.processor, batch.prompts().replace(processor=None)
    batch = unshare_patched(model, batch, edits)
    ids = _as_ids(candidates, processor, len(batch.ids), model.config.lm.vocab)
    _check_every_row(ids, batch.valid_row)
    bound_edits = binding.bind_continuation(model, batch, edits, ids.shape[-1])
    _, bound_captures = binding.bind(model, batch, binding.splices(edits), captures, "last")
    with mesh.use_mesh_of(model):
        inputs = mesh.shard_batch(batch), shard_edits(bound_edits), bound_captures, ids
        return mesh.gather_to_host(compiled_score(model, *inputs))


def _as_ids(
    candidates: Candidates, processor: Tokenizing | None, rows: int, words: int
) -> Int[AnyArray, "B C A"]:
    """Return candidates as token ids of a vocabulary with this number of words."""
    if jnp.issubdtype(getattr(candidates, "dtype", object), np.integer):
        ids = cast(AnyArray, candidates)
    elif processor is None:
        raise ValueError("candidates as strings need a batch made by a processor; or give ids")
    else:
        ids = candidate_ids(processor, cast(Sequence, candidates), rows)
    if ids.ndim != 3 or len(ids) != rows:
        raise ValueError(f"candidates as ids must be int32[{rows}, C, A], not {ids.shape}")
    if not isinstance(ids, jax.core.Tracer):
        _check_ids(np.asarray(ids), words)
    return ids


def _check_ids(ids: Int[np.ndarray, "B C A"], words: int) -> None:
    """Raise an error for ids outside the vocabulary, and for ids after the end of a candidate."""
    wrong = (ids < -1) | (ids >= words)
    wrong[..., 1:] |= (ids[..., 1:] >= 0) & (ids[..., :-1] < 0)
    if wrong.any():
        row, number, at = np.argwhere(wrong)[0]
        raise ValueError(
            f"candidates, row {row}, number {number}: id {ids[row, number, at]} at token {at}: ids "
            f"must be below {words}, the size of the vocabulary, and -1 after the last token"
        )


def _check_every_row(ids: Int[AnyArray, "B C A"], valid: Bool[AnyArray, " B"]) -> None:
    """Raise an error for a row of the batch that has no candidate, where this is known."""
    if isinstance(ids, jax.core.Tracer) or isinstance(valid, jax.core.Tracer):
        return
    without = np.flatnonzero(np.asarray(valid) & ~(np.asarray(ids) >= 0).any((1, 2)))
    if len(without):
        raise ValueError(
            f"candidates: row {without[0]} of the batch has none: give each row a list that is not "
            "empty, or strings for all rows"
        )


def answer_length(processor: Tokenizing, answers: Iterable[str]) -> int:
    """Return the length A of `candidate_ids` that holds each of these answers."""
    return _round_up(max(len(processor.answer_ids(answer)) for answer in answers))


def _round_up(length: int) -> int:
    """Round a length up, so that few programs are compiled."""
    return -(-length // 2) * 2


def candidate_ids(
    processor: Tokenizing,
    candidates: Sequence,
    rows: int,
    *,
    length: int | None = None,
    end: bool = True,
) -> Int[np.ndarray, "B C A"]:
    """Return candidates as token ids, int32[B, C, A], padded with -1.

    Args:
      processor: The processor of the batch.
      candidates: Strings for all rows, or a list of strings for each row.
      rows: The number B of rows; rows beyond the lists are all -1.
      length: The length A; by default the longest, rounded up so that few programs are compiled.
      end: Whether the candidates end their turn.
    """
    lists = _lists_by_row(candidates, rows)
    coded = [
        [
            _encode(processor, text, end, f"candidates, row {b}, number {c}")
            for c, text in enumerate(row)
        ]
        for b, row in enumerate(lists)
    ]
    C = max(len(row) for row in coded)
    A = length or _round_up(max(len(ids) for row in coded for ids in row))
    out = np.full((rows, C, A), -1, np.int32)
    for b, row in enumerate(coded):
        for c, ids in enumerate(row):
            out[b, c, : len(ids)] = ids
    return out


def _lists_by_row(candidates: Any, rows: int) -> list[list[str]]:
    """Return candidates as a list of strings for each row."""
    items = as_list(candidates, "candidates", "strings, or of lists of strings")
    if items and all(isinstance(item, str) for item in items):
        return [items] * rows
    lists = [as_list(row, f"candidates, row {b}:") for b, row in enumerate(items)]
    if len(lists) > rows:
        raise ValueError(f"candidates for {len(lists)} rows, but the batch has {rows}")
    if not any(lists):
        raise ValueError("no candidates to score")
    return lists


def _encode(processor: Tokenizing, text: Any, end: bool, where: str) -> list[int]:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: {text!r:.60} is not an answer: give a non-empty string")
    try:
        return processor.answer_ids(text, end=end)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@jax.jit
def compiled_score(
    model: Model,
    batch: Batch,
    edits: tuple[BoundEdit, ...],
    captures: dict[str, BoundCapture],
    ids: Int[Array, "B C A"],
) -> Scores:
    """Score all candidates; see `score`."""
    T, A = batch.ids.shape[1], ids.shape[-1]
    taps = Taps(edits, captures)
    x, cache = model(batch, taps)
    first = jax.nn.log_softmax(logits_at_last(model, batch, x, taps))

    def score_candidate(ids):  # int32[B, A]
        valid, at = ids >= 0, jnp.maximum(ids, 0)
        log_probs = [collectives.take_along_vocabulary(first[:, None], at[:, :1])]
        if A > 1:  # the last token is scored, not read
            taps = Taps(edits, at=T)
            x = embed_words(model, ids[:, :-1], taps)
            steps = jnp.arange(1, A)
            positions = batch.positions.after(batch.last, steps, valid[:, :-1])
            x, _ = model.read(x, positions, taps, cache)
            rest = jax.nn.log_softmax(model.logits(x, taps))
            log_probs.append(collectives.take_along_vocabulary(rest, at[:, 1:]))
        total = jnp.where(valid, jnp.concatenate(log_probs, 1), 0).sum(-1)
        return jnp.where(valid.any(-1), total, -jnp.inf)

    B, C, _ = ids.shape
    chunks = -(-C // max(1, CHUNK_TOKENS // (B * A)))
    size = -(-C // chunks)  # chunks of equal size, because each size compiles a program
    ids = jnp.pad(ids, ((0, 0), (0, chunks * size - C), (0, 0)), constant_values=-1)
    values = jax.lax.map(jax.vmap(score_candidate), ids.swapaxes(0, 1).reshape(chunks, size, B, A))
    return Scores(values.reshape(-1, B)[:C].T, taps.results(), taps.receipt_list())
