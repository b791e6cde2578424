"""Count activations with and without the strongest tokens and histograms, on the embedded model.

    python -m benchmarks.evidence [--pictures=64] [--rounds=5] [--json=FILE]

Each round counts with `mj.stats` alone and then, or before, also with `mj.top` (k=20) and
`mj.histogram`. The bound is of the median ratio of rounds. The rise of memory is that of the peak
of resident memory during a run over a quarter of the pictures, and over all of them.
"""

from __future__ import annotations

import argparse
import functools
import pathlib

import numpy as np

import mllm_jax as mj
from benchmarks import clock
from mllm_jax import sites as S
from mllm_jax.batch import Batch
from mllm_jax.data import domains
from mllm_jax.interventions.model import Model
from mllm_jax.processors.processor import Processor
from mllm_jax.store import atomic_json
from mllm_jax.typing import Float

MOST = 1.25  # time with evidence / time of plain counts
COUNTS = {"fire": mj.stats(S.lm.mlp.act)}
EVIDENCE = COUNTS | {
    "top": mj.top(S.lm.mlp.act, k=20),
    "histogram": mj.histogram(S.lm.mlp.act),
}
ROWS = 8


def picture_batches(processor: Processor, pictures: int) -> list[Batch]:
    """Return batches of embedded pictures, repeated where there are fewer."""
    by_domain = domains.embedded("test").values()
    images = [example.image for domain in by_domain for example in domain]
    images = [images[i % len(images)] for i in range(pictures)]
    parts = [images[i : i + ROWS] for i in range(0, pictures, ROWS)]
    return [processor(part, ["What is shown in the picture?"] * len(part)) for part in parts]


def measure(
    model: Model, batches: list[Batch], rounds: int
) -> tuple[dict[str, float], Float[np.ndarray, " rounds"]]:
    """Return the medians of all rounds, and the ratio of the times in each."""
    sides = {"counts": COUNTS, "counts, top and histogram": EVIDENCE}
    for captures in sides.values():
        mj.reduce(captures, model, batches[:1])  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds):
        for name in list(sides)[:: -1 if round_ % 2 else 1]:
            lap = clock.lap(functools.partial(mj.reduce, sides[name], model, batches))
            seconds[name].append(lap.seconds)
            cpu[name].append(lap.cpu)
    plain, evidence = (np.array(seconds[name]) for name in sides)
    cpu_plain, cpu_evidence = (np.array(cpu[name]) for name in sides)
    ratios = evidence / plain
    found = {
        "seconds of counts": float(np.median(plain)),
        "seconds of counts, top and histogram": float(np.median(evidence)),
        "ratio": float(np.median(ratios)),
        "ratio of CPU time": float(np.median(cpu_evidence / cpu_plain)),
    }
    for share, name in ((4, "a quarter"), (1, "all")):
        some = batches[: -(-len(batches) // share)]
        rise = clock.lap(functools.partial(mj.reduce, EVIDENCE, model, some)).rise
        found[f"rise of memory over {name}, MiB"] = np.nan if rise is None else rise / 2**20
    return found, ratios


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print and return the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    model, processor = mj.load(args.model)
    batches = picture_batches(processor, args.pictures)
    found, ratios = measure(model, batches, args.rounds)
    for name, value in found.items():
        print(f"{name:40}{value:10.3f}")
    kept = "kept" if found["ratio"] <= MOST else "MISSED"
    print(f"ratio [{ratios.min():.2f}, {ratios.max():.2f}], at most {MOST:g}: {kept}")
    if args.json:
        atomic_json(args.json, found)
    return found


if __name__ == "__main__":
    main()
