"""Plans studies on a topology, without weights or hardware: memory, work, traffic, time at least.

    python -m experiments.plan --model=llava-1.5-7b --topology=v5e:2x4 --study=counts+lens
    python -m experiments.plan --model=DIR --topology=v5p:4x4x4 --study=sweep,projection --out=DIR
    python -m experiments.plan --model=DIR --study=run --edits='ablate lm.mlp.act[12]'

With `libtpu` installed (`pip install libtpu`; no TPU is needed) each program is compiled for each
topology, one after the other; without it, or with --shapes, plans come from shapes alone and say
so. `--find=topology` looks for the smallest slice that fits from the one given on, `--find=rows`
and `--find=lanes` for the largest number of a data shard. Leaves `plan.json`, `plan.md` and
`plan.png` in --out.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import describe
from experiments.plan import plots
from experiments.running import command
from mllm_jax import store
from mllm_jax.interventions import spec
from mllm_jax.planning import plan as plans
from mllm_jax.planning import programs, search
from mllm_jax.report import style

TOPOLOGY = flags.DEFINE_list("topology", ["v5e:2x4"], "Chips and slices: v5e:2x4,v5p:4x4x4.")
STUDY = flags.DEFINE_list("study", ["counts+lens"], f"Of {', '.join(programs.STUDIES)}.")
DATA = flags.DEFINE_integer("data", None, "Data shards; by default as many as leave room.")
FSDP = flags.DEFINE_integer("fsdp", 1, "Data shards that share one copy of the weights.")
ROWS = flags.DEFINE_integer("rows", 8, "Rows of a data shard (of all, in a sweep).")
LANES = flags.DEFINE_integer("lanes", 4, "Lanes of a sweep, of a data shard.")
WORDS = flags.DEFINE_integer("words", 64, "Tokens of a row beside its picture.")
STEPS = flags.DEFINE_integer("steps", 32, "Tokens to generate.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights.")
SHAPES = flags.DEFINE_bool("shapes", False, "Compile nothing.")
FIND = flags.DEFINE_enum("find", None, ["topology", "rows", "lanes"], "What to look for.")
OUT = flags.DEFINE_string("out", None, "A folder to write to.")


def run() -> list[plans.Plan]:
    """The plans that the flags ask for, printed as they come."""
    config = describe.find(describe.MODEL.value)
    size = programs.Size(rows=ROWS.value, words=WORDS.value, lanes=LANES.value, steps=STEPS.value)
    how = {
        "edits": spec.parse(command.EDITS.value) if command.EDITS.value else None,
        "captures": spec.parse_captures(command.CAPTURES.value) if command.CAPTURES.value else None,
        "data": DATA.value,
        "fsdp": FSDP.value,
        "dtype": jnp.dtype(DTYPE.value),
        "compile": not SHAPES.value,
    }
    found = []
    for topology, name in itertools.product(TOPOLOGY.value, STUDY.value):
        plan = _find(name, config, size, how | {"topology": topology})
        found.append(plan)
        print(plan.table(), end="\n\n", flush=True)
    return found


def _find(name: str, config, size: programs.Size, how: dict) -> plans.Plan:
    if FIND.value == "topology":
        plan = search.smallest_topology(config, size, study=name, **how)
        if plan is None:
            raise ValueError(f"{name} fits on no slice from {how['topology']} on")
        return plan
    if FIND.value:
        number, plan = search.largest_that_fits(FIND.value, config, size, study=name, **how)
        print(f"the most {FIND.value} of a data shard that fit: {number}\n")
        return plan
    return plans.plan(config, size, study=name, **how)


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        found = run()
        if OUT.value:
            out = pathlib.Path(OUT.value)
            name = describe.MODEL.value
            store.atomic_json(
                out / "plan.json",
                {"model": name, "plans": [plan.json() for plan in found]},
            )
            text = [plans.summary(found), *(plan.table() for plan in found)]
            store.write(out / "plan.md", "\n\n".join(text) + "\n")
            style.save(plots.plans(name, found), out / "plan.png")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # Nothing is computed here, so a TPU that may be there is left alone.
    jax.config.update("jax_platforms", "cpu")
    flags.mark_flag_as_required("model")
    app.run(main)
