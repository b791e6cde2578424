"""Count how often each neuron is above zero over a set of pictures, as MMNeuron does."""

from __future__ import annotations

import mllm_jax as mj
from benchmarks import harness
from benchmarks.work import Work
from mllm_jax import sites as S

CAPTURES = {
    "vision": mj.stats(S.vision.mlp.act),
    "projector": mj.stats(S.projector.act),
    "lm": mj.stats(S.lm.mlp.act),
}


def sides(work: Work):
    """Return the sides of this library by name."""
    model, batches = work.model, work.batches

    def ours():
        total = mj.reduce(CAPTURES, model, batches)
        return {name: stats.positive for name, stats in total.items()}

    return {harness.OURS: ours}


BENCHMARK = harness.Benchmark(
    name="counts",
    about="activation counts of all neurons of vision, projector and LM",
    sides=sides,
    rivals=("hf_careful", "mmneuron", "mmneuron_no_grad"),
    bounds=(harness.faster("hf_careful", 1.2), harness.faster("mmneuron", 4)),
    pictures=64,
    eigen=True,
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
