"""Fine-tune low-rank matrices of the language model: a few steps of AdamW on batches of eight."""

from __future__ import annotations

from benchmarks import finetune, harness, work
from mllm_jax.training import fit

RECIPE = fit.Recipe(part="lora", rate=1e-3)


def sides(done: work.Work):
    """Return the sides of this library by name."""
    return {harness.OURS: finetune.steps(done, RECIPE)}


BENCHMARK = harness.Benchmark(
    name="finetune_lora",
    about="steps of AdamW on low-rank matrices, batches of eight, precomputed vision features",
    sides=sides,
    rivals=("hf_careful",),
    bounds=(harness.faster("hf_careful", 1.2),),
    pictures=3 * work.BATCH,
    eigen=True,
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
