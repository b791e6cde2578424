"""Count the work and traffic of a chip in compiled programs, by the number of chips.

    python -m benchmarks.scaling --model=llava-1.5-7b --out=docs/scaling [--chips=1,2,4,8,16,256]

Every program is compiled for fake devices of this machine's CPU and is not run, so no time is
measured. In weak scaling each data shard has the same rows; in strong scaling more shards share the
same rows; along the model axis more chips share the layers. Times are lower bounds at the peak
rates of a v5e.
"""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Sequence
from typing import Any

ABOUT = "work and traffic of a chip by the number of chips, counted in compiled programs"
CHIP = "v5e"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print, write and return the points."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=ABOUT)
    parser.add_argument("--model", default="llava-1.5-7b")
    parser.add_argument("--study", default="counts")
    parser.add_argument("--chips", default="1,2,4,8", help="numbers of chips")
    parser.add_argument(
        "--model-chips", default="1,2,4,8", help="numbers of chips along the model axis"
    )
    parser.add_argument(
        "--rows", type=int, default=8, help="rows of a shard (weak) or of all shards (strong)"
    )
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    chips, along = ([int(n) for n in text.split(",")] for text in (args.chips, args.model_chips))
    # Set before JAX is imported, which fixes the devices of a process.
    count = max(*chips, *along)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    points = measure(args.model, args.study, chips, along, args.rows)
    if args.out:
        write(args.out, args.model, args.study, points)
    return points


def measure(
    name: str, study: str, chips: Sequence[int], along: Sequence[int], rows: int
) -> list[dict[str, Any]]:
    """Return a point for each way of scaling and number of chips."""
    from mllm_jax import families
    from mllm_jax.planning import plan, programs
    from mllm_jax.planning.chips import CHIPS
    from mllm_jax.sharding import mesh

    ways = [("weak, data", n, (n, 1), rows) for n in chips]
    ways += [("strong, data", n, (n, 1), rows // n) for n in chips if rows % n == 0]
    ways += [("strong, model", n, (1, n), rows) for n in along]
    config, points = families.RELEASED[name](), []
    for way, n, (data, model), each in ways:
        planned = plan.plan(
            config, programs.Size(rows=each), study=study, topology=mesh.mesh(data, model)
        )
        peak = CHIPS[CHIP]
        seconds = {"compute": planned.flops / peak.flops, "links": planned.received / peak.links}
        points.append({
            "scaling": way, "chips": n, "rows": planned.rows, "flops": planned.flops,
            "received": planned.received, "weights": planned.bytes["weights"], "seconds": seconds,
            "gathers": len(planned.gathers()),
        })  # fmt: skip
        print(
            f"{way:14} {n:4} chips {planned.rows:5} rows {planned.flops / 1e12:9.3f} Tflop a chip "
            f"{planned.received / 2**20:10.2f} MiB received",
            flush=True,
        )
    return points


def write(out: pathlib.Path, name: str, study: str, points: Sequence[dict[str, Any]]) -> None:
    """Write the points as a table, as JSON and as a figure."""
    from experiments.plan import plots
    from mllm_jax import store
    from mllm_jax.report import style, tables

    store.atomic_json(out / "scaling.json", {"model": name, "study": study, "points": points})
    rows = [
        (
            p["scaling"], p["chips"], p["rows"], f"{p['flops'] / 1e12:.3f}",
            f"{p['received'] / 2**20:.1f}", f"{p['weights'] / 2**30:.2f}",
            f"{p['rows'] / max(p['seconds'].values()):.0f}",
        )
        for p in points
    ]  # fmt: skip
    columns = (
        "scaling", "chips", "rows", "Tflop a chip", "MiB received by a chip",
        "GiB of weights a chip", f"rows a second at most, {CHIP}",
    )  # fmt: skip
    store.write(out / "scaling.md", tables.markdown(columns, rows) + "\n")
    ways = list(dict.fromkeys(p["scaling"] for p in points))

    def curves(value) -> dict[str, list[tuple[int, float]]]:
        return {w: [(p["chips"], value(p)) for p in points if p["scaling"] == w] for w in ways}

    received = {
        way: [(n, mib) for n, mib in line if mib]
        for way, line in curves(lambda p: p["received"] / 2**20).items()
    }
    style.save(
        plots.scaling({
            "Tflop of a chip": curves(lambda p: p["flops"] / 1e12),
            "MiB received by a chip": {way: line for way, line in received.items() if line},
            f"rows a second at most, {CHIP}": curves(
                lambda p: p["rows"] / max(p["seconds"].values())
            ),
        }),
        out / "scaling.png",
    )  # fmt: skip


if __name__ == "__main__":
    main()
