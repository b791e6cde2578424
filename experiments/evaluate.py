"""Accuracy of a model on visual domains, by domain and style of question; any edits may be given.

    python -m experiments.evaluate --config=configs/embedded_evaluate.py --workdir=DIR \
        [--edits='ablate lm.mlp.act[12]'] [--captures='fire=stats lm.mlp.act by=kind']

The options of each question are scored by log-likelihood and the best is the answer. Leaves in the
workdir: `results.json`, `accuracy.csv`, `figures/accuracy.png`, `manifest.json`, and of captures
`captures/DOMAIN-STYLE.npz`, read while the prompts are.
"""

from __future__ import annotations

from experiments import command

if __name__ == "__main__":  # before the long imports
    command.main("experiments.evaluate", takes=("edits", "captures"), rows={"batch_size": 1})

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import tqdm

import mllm_jax as mj
from experiments import study
from mllm_jax import store
from mllm_jax.analysis import intervals
from mllm_jax.data import batching
from mllm_jax.interventions import captures as captures_
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import score
from mllm_jax.report import figures, tables


def run(config, workdir: store.Workdir, edits=None, captures=None) -> None:
    model, processor = mj.load(config.model)
    this = Study(config, workdir, model, processor, edits, captures or {})
    found = study.domains_of(config, "test")
    tests = {name: list(domain)[: config.test_per_domain] for name, domain in found.items()}
    study.claim(
        workdir,
        config,
        model,
        processor,
        {name: study.content(some) for name, some in tests.items()},
    )
    rows = {}
    for name, examples in tests.items():
        for style in config.styles:
            step = workdir.arrays(
                f"{name}-{style}",
                functools.partial(right, this, f"{name}-{style}", examples, style),
            )
            value, low, high = intervals.mean(step["right"].astype(float))
            rows[name, style] = {
                "accuracy": float(value), "low": float(low), "high": float(high),
                "n": len(step["right"]), "chance": float(step["chance"]),
            }  # fmt: skip
            count = len(step["right"])
            print(f"{name:10} {style:9} {value:.3f} [{low:.3f}, {high:.3f}] of {count}")
    columns = ("accuracy", "low", "high", "n", "chance")
    tables.write(
        workdir / "accuracy.csv", ("domain", "style", *columns),
        [(*key, *(row[c] for c in columns)) for key, row in rows.items()],
    )  # fmt: skip
    if "choice" in config.styles:
        choice = {name: rows[name, "choice"] for name in found}
        figures.save(figures.accuracy(choice), workdir / "figures" / "accuracy.png")
    nested = {name: {s: rows[name, s] for s in config.styles} for name in found}
    results = {"study": "evaluate", "accuracy": nested} | study.named(workdir)
    store.atomic_json(workdir / "results.json", results)
    store.write_manifest(workdir)


@dataclasses.dataclass(frozen=True)
class Study:
    """What every step reads."""

    config: Any
    workdir: store.Workdir
    model: Any
    processor: Any
    edits: Edits | None
    captures: dict[str, Capture]


def right(this: Study, name: str, examples: list, style: str) -> dict[str, np.ndarray]:
    """bool[N]: whether the best option of each example's question is the right one."""
    pairs = batching.ask(examples, (style,))
    length = batching.row_length(this.processor, pairs)
    asked = batching.QuestionBatches(this.processor, pairs, this.config.batch_size, length)
    found, brought, batches = [], [], []
    for i in tqdm.tqdm(range(len(asked)), desc=f"{examples[0].domain}, {style}", leave=False):
        batch, options = asked[i], asked.candidates(i)
        out = score.score_with(this.model, batch, options, this.edits, this.captures)
        found.append(np.asarray(out.values)[: len(options)].argmax(-1) == asked.right(i))
        if this.captures:
            brought.append(jax.tree.map(np.asarray, out.captures))
            batches.append(batch.replace(pixels=None, features=None))
    if this.captures:
        joined = captures_.join(this.captures, brought, batches)
        study.write_captures(this.workdir / "captures" / f"{name}.npz", joined)
    chance = np.mean([1 / len(question.options) for _, question in pairs])
    return {"right": np.concatenate(found), "chance": chance}
