"""Plan every released model on slices of TPUs and on GPUs: whether it fits, and its largest batch.

    python -m benchmarks.released --out=DIR [--topology=h100,v5e:2x4,v5e:8x8] [--study=run]

Programs are compiled for chips that are not here (docs/pods.md, docs/gpu.md say what to install),
with pictures of the largest size, and are not run. DIR receives `released.json` after each plan, so
that a run that is stopped continues, and `released.md`, a row for each model. The number of rows is
searched as `experiments.plan --find=rows` does, from a quarter of the rows of the topology before
(programs for GPUs are compiled faster). On a larger slice of the same chips, over which the mesh
splits the model alike, it is that of the smaller slice, if it fits there.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

ABOUT = "whether each released model fits, and its largest batch"
Found = dict[str, dict[str, Any]]  # by "MODEL on TOPOLOGY"


def main(argv: Sequence[str] | None = None) -> Found:
    """Plan, write and return what was found."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run
    from mllm_jax import families, store

    parser = argparse.ArgumentParser(prog="python -m benchmarks.released", description=ABOUT)
    parser.add_argument("--models", default=",".join(families.RELEASED))
    parser.add_argument("--topology", default="h100,v5e:2x4,v5e:8x8")
    parser.add_argument("--study", default="run", help="a study of mllm_jax/planning/programs.py")
    parser.add_argument(
        "--rows", type=int, default=4, help="rows that the first search begins with"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(argv)
    topologies, path = args.topology.split(","), args.out / "released.json"
    content = store.read_json(path) if path.exists() else {"study": args.study, "plans": {}}
    if content["study"] != args.study:
        raise ValueError(f"{path}: it is of --study={content['study']}; give another --out")
    found: Found = content["plans"]
    for model in args.models.split(","):
        for topology in topologies:
            name = f"{model} on {topology}"
            if name in found:
                continue
            start = time.process_time()
            known = [found[f"{model} on {t}"] for t in topologies if f"{model} on {t}" in found]
            found[name] = measure(model, topology, args.study, args.rows, known)
            seconds = time.process_time() - start
            print(f"{name}: {_cell(found[name])} ({seconds:.0f} s of CPU)", flush=True)
            store.atomic_json(path, content)
    store.write(args.out / "released.md", table(found, topologies) + "\n")
    return found


def measure(
    model: str, topology: str, study: str, rows: int, known: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Find the largest number of rows of a model on a topology.

    Args:
      model: The name of a released model.
      topology: The slice.
      study: The name of the study.
      rows: The number of rows of a data shard that the search begins with.
      known: What was found for the model on other slices.

    Returns:
      `mesh`, `capacity` and `total`, the bytes of a chip; `rows` of a data shard, 0 where a
      single one does not fit; `batch`, of all data shards; `tokens` of a row.
    """
    from mllm_jax import families
    from mllm_jax.planning import plan, search
    from mllm_jax.planning.programs import Size

    config = families.RELEASED[model]()
    how: dict[str, Any] = {"topology": topology, "study": study}
    shapes = plan.plan(config, Size(rows=1), compile=False, **how)
    if shapes.fits is False:  # the weights alone are too large: nothing is compiled
        return _found(0, shapes)
    split = shapes.mesh.split(" x ", 1)[1], shapes.capacity  # fsdp x model
    for other in known:
        if other["rows"] and (other["mesh"].split(" x ", 1)[1], other["capacity"]) == split:
            fitting = plan.plan(config, Size(rows=other["rows"]), **how)
            if fitting.fits:
                return _found(other["rows"], fitting)
    likely = known[-1]["rows"] // 4 if known else 0
    for begin in dict.fromkeys((likely or rows, 1)):
        try:
            return _found(*search.largest_that_fits("rows", config, Size(rows=begin), **how))
        except ValueError as error:
            if "do not fit" not in str(error):
                raise
    return _found(0, plan.plan(config, Size(rows=1), **how))


def _found(rows: int, plan: Any) -> dict[str, Any]:
    return {
        "mesh": plan.mesh, "tokens": plan.tokens, "rows": rows,
        "batch": rows * plan.data * plan.fsdp, "total": plan.total, "capacity": plan.capacity,
    }  # fmt: skip


def table(found: Mapping[str, Mapping[str, Any]], topologies: Sequence[str]) -> str:
    """Return a Markdown table with a row for each model and a column for each topology."""
    from mllm_jax.report import tables

    models = dict.fromkeys(name.split(" on ")[0] for name in found)
    rows = []
    for model in models:
        plans = [found.get(f"{model} on {topology}") for topology in topologies]
        tokens = next(plan["tokens"] for plan in plans if plan)
        rows.append((model, tokens, *(_cell(plan) if plan else "" for plan in plans)))
    return tables.markdown(("model", "tokens of a row", *topologies), rows)


def _cell(plan: Mapping[str, Any]) -> str:
    from mllm_jax.planning.plan import format_bytes

    memory = f"{format_bytes(plan['total'])} of {format_bytes(plan['capacity'])}"
    if not plan["rows"]:
        return f"no: {memory}"
    return f"{plan['batch']} rows on {plan['mesh']}: {memory}"


if __name__ == "__main__":
    main()
