"""Use a model of real size on a small machine, and measure the time and peak memory of each use.

    python -m benchmarks.real_size --model=DIRECTORY [--steps=16] [--most=20] [--json=FILE]

One process loads the model in bfloat16, counts activations, runs the logit lens and generates, all
with one picture on the CPU; this process reports. Seconds are those of a first run, with
compilation. `python -m tests.helpers.make_checkpoint` writes a random LLaVA-1.5-7B. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.store import atomic_json

ABOUT = "seconds and peak memory of a model of real size, one picture on the CPU"
ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30
LOADING = 1.0  # GiB beyond the model's own bytes
COUNTS = {
    "vision": mj.stats(S.vision.mlp.act),
    "projector": mj.stats(S.projector.act),
    "LM": mj.stats(S.lm.mlp.act),
}
LENS = {
    "words": mj.lens(S.lm.resid_post, k=10, where=tok.image),
    "entropy": mj.lens(S.lm.resid_post, by=tok.kind),
}


def phases(directory: pathlib.Path, steps: int) -> Iterator[dict[str, Any]]:
    """Use the model in this process.

    Yields:
      Of each phase: `name`; `seconds`; `cpu`, the seconds of all threads; `peak`, the bytes of
      this process; `result`, a summary as text. Of the first also `model`, the bytes of the
      parameters.
    """
    (model, processor), lap = _lap(lambda: mj.load(directory, dtype=jnp.bfloat16))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    yield lap | {"name": "load", "model": size, "result": f"{size / GIB:.2f} GiB of parameters"}

    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    batch = processor([PIL.Image.fromarray(noise)], ["What is shown in the picture?"])
    total, lap = _lap(lambda: mj.reduce(COUNTS, model, [batch]))
    shares = (f"{name} {s.positive.mean() / s.tokens.max():.3f}" for name, s in total.items())
    yield lap | {"name": "counts", "result": f"above zero: {', '.join(shares)}"}

    out, lap = _lap(lambda: jax.block_until_ready(mj.run(model, batch, None, LENS, logits="none")))
    nats = out["entropy"].sum.sum((1, 2)) / out["entropy"].tokens.sum((1, 2))
    ends = f"first layer {nats[0]:.2f} nats, last {nats[-1]:.2f}"
    yield lap | {"name": "lens", "result": ends}

    made, lap = _lap(lambda: np.asarray(mj.generate(model, batch, max_new_tokens=steps).tokens))
    yield lap | {"name": "generate", "result": f"tokens {' '.join(map(str, made[0]))}"}


def _lap(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return a result, and the time and memory of its computation."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return result, {"seconds": seconds, "cpu": cpu, "peak": peak}


def watched(directory: pathlib.Path, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the phases of a separate process, whose memory was not used before."""
    command = [sys.executable, "-m", "benchmarks.real_size", f"--model={directory.absolute()}"]
    command += [f"--steps={steps}", "--inside"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        why = "killed, as when memory runs out" if process.returncode < 0 else "see above"
        raise SystemExit(f"the process that uses the model ended with {process.returncode}: {why}")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print and return the phases, each with its bound on memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_size", description=ABOUT)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a checkpoint directory")
    parser.add_argument("--steps", type=int, default=16, help="tokens to generate")
    parser.add_argument("--most", type=float, default=20, help="GiB that a phase may take")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the phases")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        for phase in phases(args.model, args.steps):
            print(json.dumps(phase), flush=True)
        return []
    print(f"{'phase':12}{'seconds':>10}{'CPU':>10}{'peak':>12}{'at most':>12}")
    reported = []
    for phase in watched(args.model, args.steps):
        most = args.most * GIB
        if "model" in phase:
            most = min(most, phase["model"] + LOADING * GIB)
        reported.append(phase | {"most": most})
        print(
            f"{phase['name']:12}{phase['seconds']:10.1f}{phase['cpu']:10.1f}"
            f"{phase['peak'] / GIB:8.2f} GiB{most / GIB:8.2f} GiB"
            f"  {'kept' if phase['peak'] <= most else 'MISSED'}  {phase['result']}",
            flush=True,
        )
    if args.json:
        atomic_json(args.json, reported)
    return reported


if __name__ == "__main__":
    main()
