"""Divide the time of a clean pass: attention, norms, rotary positions, MLP, head.

    python -m benchmarks.kernels [--size=tiny] [--pictures=8] [--json=FILE]

The time is that of XLA's operations; operations that run at the same moment share it equally. An
operation belongs to the function that called it; a fusion belongs to the last one.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib

from benchmarks import profile, work
from mllm_jax.passes import run as run_
from mllm_jax.store import atomic_json

ABOUT = "the time of the parts of a clean pass"
MODULES = {"Vit.__call__": "vision", "Decoder.__call__": "LM"}
# (a function that called the operation, the name of its time); the first match counts.
PARTS = (
    ("attend", "attention"),
    ("rotate", "rotary positions"),
    ("rotary", "rotary positions"),
    ("RMSNorm.__call__", "norms"),
    ("LayerNorm.__call__", "norms"),
    ("Decoder.logits", "head"),
    ("Projector.__call__", "projector"),
    ("Attention.__call__", "products of attention's maps"),
    ("MLP.__call__", "products and activation of the MLP"),
    ("Block.__call__", "residual sums"),
)


def part(operation: str, stack: tuple[str, ...]) -> str:
    """Return the name under which the time of an operation is counted."""
    module = next((name for function, name in MODULES.items() if function in stack), "")
    if operation.startswith("dynamic-slice"):
        return f"{module} copies of a layer's weights".strip()
    name = next((name for function, name in PARTS if function in stack), "rest")
    return f"{module} {name}".strip()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print and return the seconds of each part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=ABOUT)
    parser.add_argument("--size", choices=work.SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=work.BATCH)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    size = work.SIZES[args.size]
    model, inputs = work.random_model(size.config), work.make_inputs(size, args.pictures)
    batch = work.to_batch(size.config, inputs["ids"], inputs["pixels"])
    operations = profile.seconds(
        lambda model: run_.run(model, batch).logits, model, rounds=args.rounds
    )
    parts: dict[str, float] = collections.defaultdict(float)
    for (operation, stack), seconds in operations.items():
        parts[part(operation, stack)] += seconds
    total = sum(parts.values())
    print(f"kernels: {ABOUT}")
    print(
        f"{args.pictures} pictures, {inputs['ids'].shape[1]} tokens a row, float32, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.rounds} rounds\n"
    )
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{name:44}{seconds:10.4f} s{seconds / total:8.1%}")
    print(f"{'all':44}{total:10.4f} s")
    if args.json:
        atomic_json(args.json, dict(parts))
    return dict(parts)


if __name__ == "__main__":
    main()
