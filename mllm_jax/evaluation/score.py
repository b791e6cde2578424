"""Scoring: the log-likelihood of given answers, the prompt read once for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.evaluation import generate
from mllm_jax.interventions import run as run_
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.receipts import Receipt
from mllm_jax.interventions.tap import Taps
from mllm_jax.sharding import mesh, split

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

    Args:
      candidates: C strings for all rows, a list of strings for each row (the missing of a
        shorter list score -inf), or int32[B, C, A] token ids filled up with -1.
      edits: what to change, in the prompt and in the candidates (which are of kind answer).
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
    processor, batch = batch.processor, batch.replace(processor=None)
    batch = run_.separate(model, batch, edits)
    if not hasattr(candidates, "dtype"):
        if processor is None:
            raise ValueError("candidates as text need a batch made by a processor; or give ids")
        candidates = candidate_ids(processor, candidates, len(batch.ids))
    bound = generate.bind(model, batch, edits, candidates.shape[-1])
    asked = run_.bind(model, batch, None, captures, "last")[1]
    with mesh.on(model):
        read = mesh.place(batch), run_.place(bound), asked, candidates
        return mesh.home(_score(model, *read))


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
    if not candidates:
        raise ValueError("no candidates to score")
    if isinstance(candidates[0], str):
        candidates = [candidates] * rows
    coded = [[processor.answer_ids(c, end=end) for c in row] for row in candidates]
    C = max(len(row) for row in coded)
    A = length or _rounded(max(len(ids) for row in coded for ids in row))
    out = np.full((rows, C, A), -1, np.int32)
    for b, row in enumerate(coded):
        for c, ids in enumerate(row):
            out[b, c, : len(ids)] = ids
    return out


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
        said = [split.pick(first[:, None], at[:, :1])]
        if A > 1:  # nothing is asked after the last token
            taps = Taps(edits, at=T)
            x = generate.words(model, ids[:, :-1], taps)
            x, _ = model.read(x, position, valid[:, :-1], taps, cache)
            said.append(split.pick(jax.nn.log_softmax(model.logits(x, taps)), at[:, 1:]))
        total = jnp.where(valid, jnp.concatenate(said, 1), 0).sum(-1)
        return jnp.where(valid.any(-1), total, -jnp.inf)

    B, C, _ = ids.shape
    parts = -(-C // max(1, TOGETHER // (B * A)))
    together = -(-C // parts)  # as even as they come: each size is a program of its own
    ids = jnp.pad(ids, ((0, 0), (0, parts * together - C), (0, 0)), constant_values=-1)
    values = jax.lax.map(jax.vmap(one), ids.swapaxes(0, 1).reshape(parts, together, B, A))
    return Scores(values.reshape(-1, B)[:C].T, taps.captured, taps.receipt_list())
