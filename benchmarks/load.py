"""Read a checkpoint in the layout of transformers onto the device."""

from __future__ import annotations

from benchmarks import harness
from benchmarks.work import Work
from mllm_jax.loading.load import read_model


def sides(work: Work):
    """Return the sides of this library by name."""

    def read():
        return read_model(work.directory / "checkpoint", dtype=work.size.dtype)

    return {harness.OURS: harness.timed(read)}


BENCHMARK = harness.Benchmark(
    name="load",
    about="reading a checkpoint onto the device",
    sides=sides,
    rivals=("hf_careful",),
    pictures=1,
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
