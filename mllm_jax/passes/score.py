"""Scoring: the log-likelihood of given answers, the prompt read once for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.receipts import Receipt
from mllm_jax.interventions.tap import Taps
from mllm_jax.passes import generate
from mllm_jax.passes import run as run_
from mllm_jax.processors.prompts import as_list
from mllm_jax.sharding import collectives, mesh

TOGETHER = 512  # tokens of candidates, over all rows, whose logits exist at one time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What scoring brings back.

    Attributes:
      values: float32[B, C], natural log-likelihood of each candidate.
      captures: by name, of the prompt.
      receipts: of each edit, over the prompt.
    """

    values: Any
    captures: dict[str, Any]
    receipts: tuple[Receipt, ...]


def score(model, batch, candidates, edits: Edits | None = None) -> jax.Array:
    """float32[B, C]: natural log-likelihood of each candidate answer, its end of turn included.

    The prompt alone is read: answers that the batch holds are not seen.

    Args:
      candidates: C strings for all rows, a list of strings for each row (the missing of a
        shorter list score -inf), or int32[B, C, A] token ids filled up with -1.
      edits: what to change, in the prompt and in the candidates (which are of kind answer).

    Raises:
      ValueError: the candidates are no such list, or one is empty; a row of the batch holds several
        questions; or an edit does not fit.
    """
    return score_with(model, batch, candidates, edits).values


def score_with(
    model,
    batch,
    candidates,
    edits: Edits | None = None,
    captures: dict[str, Capture] | None = None,
) -> Scores:
    """`score`, with captures and receipts of the prompt."""
    processor, batch = batch.processor, batch.prompts().replace(processor=None)
    batch = run_.separate(model, batch, edits)
    if not jnp.issubdtype(getattr(candidates, "dtype", object), np.integer):
        if processor is None:
            raise ValueError("candidates as text need a batch made by a processor; or give ids")
        candidates = candidate_ids(processor, candidates, len(batch.ids))
    if candidates.ndim != 3 or len(candidates) != len(batch.ids):
        raise ValueError(
            f"candidates as ids are int32[B, C, A] of {len(batch.ids)} rows, not {candidates.shape}"
        )
    bound = generate.bind(model, batch, edits, candidates.shape[-1])
    asked = run_.bind(model, batch, None, captures, "last")[1]
    with mesh.use_mesh_of(model):
        read = mesh.shard_batch(batch), run_.place(bound), asked, candidates
        return mesh.gather_to_host(_score(model, *read))


def answer_length(processor, answers: Iterable[str]) -> int:
    """A of `candidate_ids` that holds each of these answers."""
    return _rounded(max(len(processor.answer_ids(answer)) for answer in answers))


def _rounded(longest: int) -> int:
    """Up, so that few programs are compiled."""
    return -(-longest // 2) * 2


def candidate_ids(
    processor,
    candidates: Sequence,
    rows: int,
    *,
    length: int | None = None,
    end: bool = True,
) -> np.ndarray:
    """int32[B, C, A]: candidates as tokens, filled up with -1.

    Args:
      candidates: strings for all rows, or a list of strings for each row.
      rows: B; rows beyond those that have candidates are all -1.
      length: A; by default the longest, rounded up so that few programs are compiled.
      end: whether they end their turn.
    """
    lists = _lists(candidates, rows)
    coded = [
        [
            _coded(processor, text, end, f"candidates, row {b}, number {c}")
            for c, text in enumerate(row)
        ]
        for b, row in enumerate(lists)
    ]
    C = max(len(row) for row in coded)
    A = length or _rounded(max(len(ids) for row in coded for ids in row))
    out = np.full((rows, C, A), -1, np.int32)
    for b, row in enumerate(coded):
        for c, ids in enumerate(row):
            out[b, c, : len(ids)] = ids
    return out


def _lists(candidates: Any, rows: int) -> list[list[str]]:
    """Candidates as a list of strings for each row."""
    found = as_list(candidates, "candidates", "strings, or of lists of strings")
    if found and all(isinstance(one, str) for one in found):
        return [found] * rows
    lists = [as_list(row, f"candidates, row {b}:") for b, row in enumerate(found)]
    if len(lists) > rows:
        raise ValueError(f"candidates for {len(lists)} rows, but the batch has {rows}")
    if not any(lists):
        raise ValueError("no candidates to score")
    return lists


def _coded(processor, text: Any, end: bool, at: str) -> list[int]:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{at}: {text!r:.60} is no text that could be said")
    try:
        return processor.answer_ids(text, end=end)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from error


@jax.jit
def _score(model, batch, edits, captures, ids) -> Scores:
    T, A = batch.ids.shape[1], ids.shape[-1]
    taps = Taps(edits, captures)
    x, cache = model(batch, taps)
    first = jax.nn.log_softmax(run_.at_last(model, batch, x, taps))
    last = jnp.take_along_axis(jnp.asarray(batch.position), batch.last[:, None], 1)
    position = last + 1 + jnp.arange(A - 1)

    def one(ids):  # int32[B, A]
        valid, at = ids >= 0, jnp.maximum(ids, 0)
        said = [collectives.take_along_vocabulary(first[:, None], at[:, :1])]
        if A > 1:  # nothing is asked after the last token
            taps = Taps(edits, at=T)
            x = generate.words(model, ids[:, :-1], taps)
            x, _ = model.read(x, position, valid[:, :-1], taps, cache)
            said.append(
                collectives.take_along_vocabulary(
                    jax.nn.log_softmax(model.logits(x, taps)), at[:, 1:]
                )
            )
        total = jnp.where(valid, jnp.concatenate(said, 1), 0).sum(-1)
        return jnp.where(valid.any(-1), total, -jnp.inf)

    B, C, _ = ids.shape
    parts = -(-C // max(1, TOGETHER // (B * A)))
    together = -(-C // parts)  # as even as they come: each size is a program of its own
    ids = jnp.pad(ids, ((0, 0), (0, parts * together - C), (0, 0)), constant_values=-1)
    values = jax.lax.map(jax.vmap(one), ids.swapaxes(0, 1).reshape(parts, together, B, A))
    return Scores(values.reshape(-1, B)[:C].T, taps.captured, taps.receipt_list())
