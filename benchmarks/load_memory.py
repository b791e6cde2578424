"""Measure the memory of loading: `python -m benchmarks.load_memory [--model=llava-1.5-7b]`.

Writes a checkpoint of random bfloat16 numbers in shards, loads it in a separate process, and prints
the peak of resident memory of that process and the bytes of the model. The bound is the model and
1 GiB, including Python and JAX; it holds as well where the model is split over fake devices.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

from benchmarks import work
from mllm_jax import families
from mllm_jax.models import clip, decoder
from mllm_jax.models.multimodal import MultimodalConfig

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30
BOUND = 1 * GIB


def about_one_gib() -> MultimodalConfig:
    """Return a config with the real vision tower and vocabulary, and a narrower language model."""
    lm = decoder.DecoderConfig(width=1536, layers=6, heads=12, kv_heads=12, mlp=4096)
    return work.model_config(clip.ClipConfig.vit_l_14_336(), lm)


def measure(directory: pathlib.Path, devices: int = 1) -> dict[str, float]:
    """Load the checkpoint in this process, split over its devices if there are several.

    Returns:
      In bytes: `model`, the arrays of the model; `before`, the resident memory after all imports;
      `peak`, the peak of resident memory of the process, including mapped files; `own`, the peak
      of memory that is not mapped from files. And the `seconds` of loading.
    """
    import jax

    import mllm_jax as mj
    from mllm_jax.loading import load

    mesh = mj.mesh(model=devices) if devices > 1 else None
    before, own, done = _status("VmRSS"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            own.append(_status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load.read_model(directory, dtype=jax.numpy.bfloat16, mesh=mesh)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {
        "model": size,
        "before": before,
        "peak": _status("VmHWM"),
        "own": max(own),
        "seconds": seconds,
    }


def _status(name: str) -> int:
    """Return the bytes of a field of Linux's status of this process."""
    text = pathlib.Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    return 1024 * int(kilobytes)


def run(
    model: str | None = None, directory: str | None = None, devices: int = 1
) -> dict[str, float]:
    """Write the checkpoint, unless there is one, and measure in another process."""
    if directory:
        command = [sys.executable, "-m", "benchmarks.load_memory", f"--measure={directory}"]
        command.append(f"--devices={devices}")
        fake = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        out = subprocess.check_output(command, text=True, cwd=ROOT, env=os.environ | fake)
        return json.loads(out.splitlines()[-1])
    from tests.helpers import random_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        config = families.RELEASED[model]() if model else about_one_gib()
        shard = random_checkpoint.SHARD if model else GIB // 4
        random_checkpoint.write(config, pathlib.Path(temporary), shard=shard)
        return run(directory=temporary, devices=devices)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=families.RELEASED, help="a released model; by default one of about 1 GiB"
    )
    parser.add_argument("--directory", help="an existing checkpoint")
    parser.add_argument(
        "--devices", type=int, default=1, help="the number of fake devices to split the model over"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(pathlib.Path(args.measure), args.devices)))
        return
    measured = run(args.model, args.directory, args.devices)
    for name, what in (
        ("model", "the model"),
        ("before", "Python, JAX and this library"),
        ("peak", "peak resident memory"),
        ("own", "  of it not mapped from files"),
    ):
        print(f"{what:32} {measured[name] / GIB:8.3f} GiB")
    over = measured["peak"] - measured["model"]
    print(f"{'peak above the model':32} {over / GIB:8.3f} GiB, bound {BOUND / GIB:.0f} GiB")
    print(f"{'time':32} {measured['seconds']:8.1f} s")
    if over > BOUND:
        sys.exit("the bound is exceeded")


if __name__ == "__main__":
    main()
