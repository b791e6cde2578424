"""Score many answers to one question by their log-likelihood."""

from __future__ import annotations

import jax
import numpy as np

import mllm_jax as mj
from benchmarks import harness
from benchmarks.work import Work
from mllm_jax import tokens


def sides(work: Work):
    """Return the sides of this library by name."""
    model, batch = work.model, work.batch(rows=1)
    candidates = work.inputs["candidates"].astype(np.int32)
    full_rows = [_with_answer(batch, candidate) for candidate in candidates]

    def ours():
        return {"scores": np.asarray(mj.score(model, batch, candidates[None])[0])}

    def full():
        return {"scores": np.array([_said(model, b, c) for b, c in zip(full_rows, candidates)])}

    return {harness.OURS: ours, "full forwards": full}


def _with_answer(batch, answer):
    """Return the batch of one row with an answer after it, which padding completes."""
    A, real = len(answer), answer >= 0
    T = batch.ids.shape[1]

    def extend(array, values):
        return np.concatenate([array, np.asarray(values, array.dtype)[None]], 1)

    map_ = batch.tokens
    kind = np.where(real, tokens.CODE["answer"], tokens.CODE["pad"])
    none = np.full(A, -1)
    return batch.replace(
        ids=extend(batch.ids, np.maximum(answer, 0)),
        position=extend(batch.position, T + np.arange(A)),
        image_token_index=extend(batch.image_token_index, none),
        tokens=tokens.TokenMap(
            kind=extend(map_.kind, kind), row=extend(map_.row, none),
            column=extend(map_.column, none), tile=extend(map_.tile, none),
            last=extend(map_.last, np.zeros(A)),
        ),
    )  # fmt: skip


def _said(model, batch, answer):
    logits = mj.run(model, batch, logits="all").logits[0]
    A = len(answer)
    log_probs = np.asarray(jax.nn.log_softmax(logits[-A - 1 : -1]))
    return (log_probs[np.arange(A), np.maximum(answer, 0)] * (answer >= 0)).sum()


BENCHMARK = harness.Benchmark(
    name="score",
    about="log-likelihood of candidate answers to one question",
    sides=sides,
    rivals=("hf_careful", "hf_ordinary"),
    bounds=(harness.faster("full forwards", 8), harness.faster("hf_ordinary", 8)),
    pictures=1,
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
