"""Generate greedily under two edits: an ablation at all tokens, a vector added to text tokens."""

from __future__ import annotations

import numpy as np

import mllm_jax as mj
from benchmarks import harness
from benchmarks.work import Work
from mllm_jax import sites as S
from mllm_jax import tokens as tok


def sides(work: Work):
    """Return the sides of this library by name."""
    model, batch = work.model, work.batch(rows=work.fields["pictures"])
    layer, (start, stop) = work.fields["ablated_layer"], work.fields["steered_layers"]
    steer = mj.add(S.lm.resid_post[start:stop], work.inputs["vector"], where=tok.text)
    edits = mj.ablate(S.lm.mlp.act[layer, work.inputs["ablated"]]) >> steer

    def ours():
        generated = mj.generate(model, batch, edits, max_new_tokens=work.fields["steps"])
        return {"tokens": np.asarray(generated.tokens)}

    return {harness.OURS: ours}


BENCHMARK = harness.Benchmark(
    name="generate",
    about="greedy tokens under an ablation and a steering vector",
    sides=sides,
    rivals=("hf_careful",),
    bounds=(harness.faster("hf_careful", 1.5),),
    codes=("tokens",),
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
