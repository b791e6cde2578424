"""The steps of the evaluation; see `experiments/evaluate/__main__.py`."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

import mllm_jax as mj
from experiments import context, examples
from experiments.context import Context
from mllm_jax import store
from mllm_jax.analysis import intervals
from mllm_jax.data import batching
from mllm_jax.interventions import forms
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import score
from mllm_jax.report import figures, style, tables

COLUMNS = ("accuracy", "low", "high", "n", "chance")


def run(
    config: ml_collections.ConfigDict,
    workdir: store.Workdir,
    edits: Edits | None = None,
    captures: dict[str, Capture] | None = None,
) -> None:
    """Run the evaluation.

    Args:
      config: Its settings, see configs/embedded_evaluate.py.
      workdir: The folder of its steps and results.
      edits: Edits of every pass.
      captures: Captures to read during the prompts.
    """
    if not config.styles:
        raise ValueError("config.styles is empty: name the styles of the questions, such as choice")
    model, processor = mj.load(config.model)
    study = Context(
        config=config, workdir=workdir, model=model, processor=processor, edits=edits or Edits(),
        captures=captures or {},
    )  # fmt: skip
    domains = examples.domains_of(config, "test")
    tests = {name: list(domain)[: config.test_per_domain] for name, domain in domains.items()}
    study.claim({name: context.content(pictures) for name, pictures in tests.items()})
    accuracy = {
        name: {wording: _accuracy(study, name, pictures, wording) for wording in config.styles}
        for name, pictures in tests.items()
    }
    study.finish({"study": "evaluate", "accuracy": accuracy}, write)


def write(workdir: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Write `accuracy.csv`, and `figures/accuracy.png` of the multiple-choice questions."""
    accuracy = results["accuracy"]
    tables.write(
        workdir / "accuracy.csv", ("domain", "style", *COLUMNS),
        [(name, wording, *(row[c] for c in COLUMNS))
         for name, by_style in accuracy.items() for wording, row in by_style.items()],
    )  # fmt: skip
    choice = {name: by_style.get("choice") for name, by_style in accuracy.items()}
    if all(choice.values()):
        style.save(figures.accuracy(choice), workdir / "figures" / "accuracy.png")


def _accuracy(study: Context, name: str, pictures: list, wording: str) -> dict[str, Any]:
    """Return the accuracy on a domain with its interval, and print it."""
    step = study.workdir.arrays(
        f"{name}-{wording}", functools.partial(score_options, study, name, pictures, wording)
    )
    value, low, high = intervals.mean(step["right"].astype(float))
    count = len(step["right"])
    print(f"{name:10} {wording:9} {value:.3f} [{low:.3f}, {high:.3f}] of {count}")
    return {
        "accuracy": float(value), "low": float(low), "high": float(high), "n": count,
        "chance": float(step["chance"]),
    }  # fmt: skip


def score_options(study: Context, name: str, pictures: list, wording: str) -> dict[str, np.ndarray]:
    """Score the options of each question.

    Args:
      study: The study.
      name: The name of the domain.
      pictures: Its examples.
      wording: The style of the questions.

    Returns:
      `right`, bool[N], whether the best option is the right one; `chance`, the share of a guess.
    """
    pairs = batching.ask(pictures, (wording,))
    length = batching.row_length(study.processor, pairs)
    questions = batching.QuestionBatches(study.processor, pairs, study.config.batch_size, length)
    right, captured, batches = [], [], []
    label = f"{pictures[0].domain}, {wording}"
    for i in tqdm.tqdm(range(len(questions)), desc=label, leave=False):
        batch, options = questions[i], questions.candidates(i)
        out = score.score_with(study.model, batch, options, study.edits, study.captures)
        right.append(np.asarray(out.values)[: len(options)].argmax(-1) == questions.right(i))
        if study.captures:
            captured.append(jax.tree.map(np.asarray, out.captures))
            batches.append(batch.replace(pixels=None, features=None))
    if study.captures:
        joined = forms.join(study.captures, captured, batches)
        path = study.workdir / "captures" / f"{name}-{wording}.npz"
        context.write_captures(path, joined)
    chance = np.mean([1 / len(question.options) for _, question in pairs])
    return {"right": np.concatenate(right), "chance": np.asarray(chance)}
