"""Run the logit lens at every layer and token: entropy and the ten most likely words."""

from __future__ import annotations

import jax
import numpy as np

import mllm_jax as mj
from benchmarks import harness
from benchmarks.work import Work
from mllm_jax import sites as S
from mllm_jax.interventions import logit_lens

CAPTURES = {"lens": mj.lens(S.lm.resid_post, k=10)}


def sides(work: Work):
    """Return the sides of this library by name."""
    model, batch = work.model, work.batch(rows=work.fields["pictures"])
    lm, (B, T) = work.size.config.lm, batch.ids.shape
    states = jax.random.normal(jax.random.key(0), (lm.layers * B * T, lm.width))

    def ours():
        lens = mj.run(model, batch, None, CAPTURES, logits="none")["lens"]
        return {name: np.asarray(getattr(lens, name)) for name in ("entropy", "log_probs", "ids")}

    return {
        harness.OURS: ours,
        "pass without lens": harness.timed(mj.run, model, batch),
        "products of the lens": harness.timed(jax.jit(_products), model, states),
    }


def _products(model, states):
    """Compute the matrix products of the lens alone; only the maximum of the logits is kept."""
    chunk = logit_lens.chunk_size(model.config.lm.vocab, jax.default_backend())
    parts = states.reshape(-1, min(chunk, len(states)), states.shape[-1])
    return jax.lax.map(lambda part: model.lm.logits(part).max(-1), parts)


def _over_products(series):
    """Return the time of the lens alone, relative to that of its products."""
    lens = series[harness.OURS].seconds - series["pass without lens"].seconds
    return lens / series["products of the lens"].seconds


def _memory(series):
    return series[harness.OURS].rise / series["mmneuron"].rise


BENCHMARK = harness.Benchmark(
    name="lens",
    about="entropy and ten most likely words of every layer and token",
    sides=sides,
    rivals=("hf_careful", "mmneuron"),
    bounds=(
        harness.faster("hf_careful", 1),
        harness.Bound("lens / its matrix products", _over_products, most=1.3),
        harness.Bound("rise of memory / that of mmneuron", _memory, most=0.1),
    ),
    pictures=2,
    codes=("ids",),
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
