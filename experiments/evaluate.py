"""Accuracy of a model on visual domains, by domain and style of question; any edits may be given.

    python -m experiments.evaluate --config=configs/embedded_evaluate.py --workdir=DIR

The options of each question are scored by log-likelihood and the best is the answer. Leaves in the
workdir: `results.json`, `accuracy.csv`, `figures/accuracy.png`, `manifest.json`.
"""

from __future__ import annotations

import numpy as np
import tqdm

import mllm_jax as mj
from experiments import study
from mllm_jax import workdir as workdir_
from mllm_jax.analysis import intervals
from mllm_jax.data import batching
from mllm_jax.evaluation import score
from mllm_jax.report import figures, tables


def run(config, workdir: workdir_.Workdir) -> None:
    model, processor = mj.load(config.model)
    found = study.domains_of(config, "test")
    rows = {}
    for name, domain in found.items():
        examples = list(domain)[: config.test_per_domain]
        for style in config.styles:
            step = workdir.arrays(
                f"{name}-{style}", lambda e=examples, s=style: right(config, model, processor, e, s)
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
    workdir_.atomic_json(workdir / "results.json", {"study": "evaluate", "accuracy": nested})
    workdir_.manifest(workdir, model=workdir_.fingerprint(model))


def right(config, model, processor, examples: list, style: str) -> dict[str, np.ndarray]:
    """bool[N]: whether the best option of each example's question is the right one."""
    pairs = batching.ask(examples, (style,))
    asked = batching.Asked(
        processor, pairs, config.batch_size, batching.row_length(processor, pairs)
    )
    found = []
    for i in tqdm.tqdm(range(len(asked)), desc=f"{examples[0].domain}, {style}", leave=False):
        options = asked.candidates(i)
        values = score.score(model, asked[i], options)
        found.append(np.asarray(values)[: len(options)].argmax(-1) == asked.right(i))
    chance = np.mean([1 / len(question.options) for _, question in pairs])
    return {"right": np.concatenate(found), "chance": chance}


if __name__ == "__main__":
    study.main(run)
