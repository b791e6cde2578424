"""Run many single-layer ablations on one batch, and read the logits of the options."""

from __future__ import annotations

import numpy as np

import mllm_jax as mj
from benchmarks import harness
from benchmarks.work import Work
from mllm_jax import sites as S


def sides(work: Work):
    """Return the sides of this library by name."""
    model, batch, options = (
        work.model,
        work.batch(rows=work.fields["pictures"]),
        work.inputs["options"],
    )
    edits = [
        mj.ablate(S.lm.mlp.act[layer, neurons])
        for layer, neurons in zip(work.inputs["layers"], work.inputs["neurons"], strict=True)
    ]

    def metric(out):
        return out.logits[:, options]

    def ours():
        return {"logits": np.asarray(mj.sweep(metric, model, batch, edits))}

    return {harness.OURS: ours}


BENCHMARK = harness.Benchmark(
    name="sweep",
    about="single-layer ablations (layers x groups of neurons), logits of four options",
    sides=sides,
    rivals=(
        "hf_careful",
        "hf_compiled",
        "hf_ordinary",
        "transformer_lens",
        "transformer_lens_reuse",
        "nnsight",
        "nnsight_reuse",
    ),
    bounds=(
        harness.faster("hf_careful", 2),
        harness.faster("hf_ordinary", 3),
        harness.faster("transformer_lens", 4),
        harness.faster("nnsight", 4),
    ),
    eigen=True,
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
