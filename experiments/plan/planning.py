"""Compute, print and write the plans of studies on topologies."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp

from experiments.describe import description
from experiments.plan import plots
from mllm_jax import store
from mllm_jax.interventions import spec
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.planning import plan as plans
from mllm_jax.planning import programs, search
from mllm_jax.report import style

Target = Literal["topology", "rows", "lanes"] | None  # of a search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a plan, see the flags of `experiments.plan`.

    Attributes:
      model: The name of the model, see `description.find`.
      topologies: The slices to plan on.
      studies: The studies to plan.
      edits: The text of the edits of each pass.
      captures: The text of the captures of each pass.
      data: The number of data shards; None for as many as fit.
      fsdp: The number of data shards that share the weights.
      rows: The rows of a data shard.
      lanes: The lanes of a sweep in a data shard.
      words: The tokens of a row besides its picture.
      steps: The number of tokens to generate.
      dtype: The dtype of the weights.
      compile: Whether programs are compiled, if there is a compiler.
      find: The target of a search; None for no search.
    """

    model: str
    topologies: Sequence[str]
    studies: Sequence[str]
    edits: str | None = None
    captures: str | None = None
    data: int | None = None
    fsdp: int = 1
    rows: int = 8
    lanes: int = 4
    words: int = 64
    steps: int = 32
    dtype: str = "bfloat16"
    compile: bool = True
    find: Target = None

    @property
    def size(self) -> programs.Size:
        """The sizes of the inputs."""
        return programs.Size(rows=self.rows, words=self.words, lanes=self.lanes, steps=self.steps)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `mj.plan` that all plans share."""
        return {
            "edits": None if self.edits is None else spec.parse(self.edits),
            "captures": None if self.captures is None else spec.parse_captures(self.captures),
            "data": self.data,
            "fsdp": self.fsdp,
            "dtype": jnp.dtype(self.dtype),
            "compile": self.compile,
        }


def run(options: Options, out: str | None = None) -> list[plans.Plan]:
    """Print the plan of each study on each topology, and write them.

    Args:
      options: The options of the plans.
      out: The folder to write `plan.json`, `plan.md` and `plan.png` to; None for none.

    Returns:
      The plans.
    """
    config, arguments = description.find(options.model), options.arguments()
    computed = []
    for topology, study in itertools.product(options.topologies, options.studies):
        plan = _plan(options, config, study=study, topology=topology, **arguments)
        computed.append(plan)
        print(plan.table(), end="\n\n", flush=True)
    if out:
        _write(pathlib.Path(out), options.model, computed)
    return computed


def _plan(options: Options, config: MultimodalConfig, **arguments: Any) -> plans.Plan:
    """Return one plan, or the result of the search."""
    if options.find is None:
        return plans.plan(config, options.size, **arguments)
    if options.find == "topology":
        plan = search.smallest_topology(config, options.size, **arguments)
        if plan is None:
            study, topology = arguments["study"], arguments["topology"]
            raise ValueError(f"{study} fits on no slice of the size of {topology} or larger")
        return plan
    number, plan = search.largest_that_fits(options.find, config, options.size, **arguments)
    print(f"the largest number of {options.find} of a data shard that fits: {number}\n")
    return plan


def _write(out: pathlib.Path, model: str, computed: Sequence[plans.Plan]) -> None:
    """Write the plans as JSON, Markdown and a figure."""
    content = {"model": model, "plans": [plan.json() for plan in computed]}
    store.atomic_json(out / "plan.json", content)
    texts = [plans.summary(computed), *(plan.table() for plan in computed)]
    store.write(out / "plan.md", "\n\n".join(texts) + "\n")
    style.save(plots.plans(model, computed), out / "plan.png")
