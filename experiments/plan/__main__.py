"""Plan studies on a topology, without weights or hardware: memory, FLOPs, traffic, minimum time.

    python -m experiments.plan --model=llava-1.5-7b --topology=v5e:2x4 --study=counts+lens
    python -m experiments.plan --model=DIR --topology=v5p:4x4x4 --study=sweep,projection --out=DIR
    python -m experiments.plan --model=DIR --study=run --edits='ablate lm.mlp.act[12]'
    python -m experiments.plan --model=DIR --topology=h100,l40s:4 --study=counts --find=rows

With `libtpu` installed (`pip install libtpu`; no TPU is needed) each program is compiled for each
topology of TPUs. Without it, or with --shapes, plans are computed from shapes only, and say so.
Topologies of GPUs (h100, h200, a100, l40s; h100:8 is eight of them) need the extra `plan-gpu`.
`--find=topology` searches for the smallest sufficient slice, starting at the given one;
`--find=rows` and `--find=lanes` search for the largest number per data shard. The folder --out
receives `plan.json`, `plan.md` and `plan.png`.
"""

from __future__ import annotations

from typing import cast

from absl import flags

from experiments.running import cli
from mllm_jax.planning import chips

MODEL = flags.DEFINE_string("model", None, "A released model, a checkpoint directory, or a hub id.")
TOPOLOGY = flags.DEFINE_list("topology", ["v5e:2x4"], "Chips and slices: v5e:2x4,h100,h100:8.")
STUDY = flags.DEFINE_list(
    "study", ["counts+lens"], "Studies of mllm_jax/planning/programs.py: run,sweep,counts+lens."
)
EDITS = flags.DEFINE_string(
    "edits", None, "Edits of every pass, as in the studies: 'ablate lm.mlp.act[12]'."
)
CAPTURES = flags.DEFINE_string(
    "captures", None, "Captures of every pass, as in the studies: 'fire=stats lm.mlp.act'."
)
DATA = flags.DEFINE_integer("data", None, "Data shards; by default as many as fit.", lower_bound=1)
FSDP = flags.DEFINE_integer(
    "fsdp", 1, "Data shards that share one copy of the weights.", lower_bound=1
)
ROWS = flags.DEFINE_integer(
    "rows", 8, "Rows per data shard (of all shards, in a sweep).", lower_bound=1
)
LANES = flags.DEFINE_integer("lanes", 4, "Lanes of a sweep per data shard.", lower_bound=1)
WORDS = flags.DEFINE_integer("words", 64, "Tokens of a row besides its picture.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 32, "Tokens to generate.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "The dtype of the weights.")
SHAPES = flags.DEFINE_bool("shapes", False, "Plan from shapes only, without compilation.")
FIND = flags.DEFINE_enum("find", None, ["topology", "rows", "lanes"], "What to search for.")
OUT = flags.DEFINE_string("out", None, "A folder to write the plans to.")


def check() -> None:
    """Check the flags."""
    if not MODEL.value:
        raise ValueError("--model is missing: --model=NAME, --model=DIR or a hub id")
    cli.require_checkpoint("--model", MODEL.value, released=True)
    for topology in TOPOLOGY.value:
        chips.Slice.parse(topology)
    cli.check_items(EDITS.value, CAPTURES.value)
    cli.refuse_file("--out", OUT.value)


def main() -> None:
    """Print the plans, and write them if --out says so."""
    import jax

    from experiments.plan import planning

    # Nothing is computed here, so a TPU or GPU of this machine is left to others.
    jax.config.update("jax_platforms", "cpu")

    planning.run(
        planning.Options(
            model=MODEL.value or "", topologies=TOPOLOGY.value, studies=STUDY.value,
            edits=EDITS.value, captures=CAPTURES.value, data=DATA.value,
            fsdp=FSDP.value, rows=ROWS.value, lanes=LANES.value, words=WORDS.value,
            steps=STEPS.value, dtype=DTYPE.value, compile=not SHAPES.value,
            find=cast(planning.Target, FIND.value),
        ),
        OUT.value,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, check)
