"""Collect vectors on disk and read all of them in random order.

    python -m benchmarks.collect [--vectors=1000000] [--width=576] [--rounds=3] [--json=FILE]

The rate of reading counts the bytes of the vectors alone, not those of their places, which are read
too. `cached` reads files that lie in the page cache; for `disk` the system was asked to drop them
from it before each round. The vectors are word embeddings, so that writing is measured rather than
a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np

import mllm_jax as mj
from benchmarks import work
from mllm_jax import sites as S
from mllm_jax.batch import Batch
from mllm_jax.models.clip import ClipConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.passes.collect import DTYPES, VectorSource
from mllm_jax.store import atomic_json

LEAST = 200.0  # MB/s
ROWS, TOKENS = 64, 1024  # of a batch


def text_batches(config: MultimodalConfig, count: int) -> list[Batch]:
    """Return batches of random words without pictures."""
    rng, side = np.random.default_rng(0), config.vision.image_size
    pixels = np.zeros((ROWS, 3, side, side), np.float32)
    made = []
    for _ in range(count):
        ids = rng.integers(1, config.image_token, (ROWS, TOKENS), np.int32)
        batch = work.to_batch(config, ids, pixels)
        none = {name: getattr(batch, name)[:0] for name in ("pixels", "tile", "is_real_tile")}
        made.append(batch.replace(**none))
    return made


def drop_from_cache(folder: pathlib.Path) -> None:
    """Ask the system to drop the files of a folder from the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(source: VectorSource, size: int, seed: int) -> float:
    """Return the seconds in which all vectors are read once in random order."""
    start, total = time.perf_counter(), 0
    for part in source.shuffled(size, seed=seed):
        total += part.value.nbytes
    assert total == len(source) * source.dtype.itemsize * source.shape[0], "a vector is missing"
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print and return MB/s by dtype and by where the files lie."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect", description=__doc__)
    parser.add_argument("--vectors", type=int, default=10**6)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=4096, help="vectors that are read at one time")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    lm = dataclasses.replace(DecoderConfig.tiny(), width=args.width, layers=1)
    config = work.model_config(ClipConfig.tiny(), lm, fold=1, image_token=lm.vocab - 1)
    model = work.random_model(config)
    batches = text_batches(config, -(-args.vectors // (ROWS * TOKENS)))
    rates: dict[str, float] = {}
    print(f"{'':32}{'MB/s':>10}")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as directory:
            folder = pathlib.Path(directory) / "vectors"
            start = time.perf_counter()
            captures = {"x": mj.keep(S.lm.embed)}
            source = mj.collect(captures, model, batches, folder, dtype=dtype)["x"]  # type: ignore[arg-type]
            size = len(source) * args.width * source.dtype.itemsize / 1e6
            rates[f"{dtype}, collected"] = size / (time.perf_counter() - start)
            prepare: dict[str, Callable[[pathlib.Path], None]] = {
                "cached": lambda folder: None,
                "disk": drop_from_cache,
            }
            for name, ready in prepare.items():
                seconds = []
                for seed in range(args.rounds):
                    ready(folder)
                    seconds.append(read_all(source, args.size, seed))
                rates[f"{dtype}, read from {name}"] = size / float(np.median(seconds))
    for name, rate in rates.items():
        bound = "" if "read" not in name else "kept" if rate >= LEAST else "MISSED"
        print(f"{name:32}{rate:10.0f}  {bound and f'at least {LEAST:g}: {bound}'}")
    if args.json:
        atomic_json(args.json, rates)
    return rates


if __name__ == "__main__":
    main()
