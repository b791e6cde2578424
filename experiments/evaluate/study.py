"""The steps of the evaluation; see `experiments/evaluate/__main__.py`."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
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
from mllm_jax.batch import Batch
from mllm_jax.data import batching
from mllm_jax.evaluation import answers
from mllm_jax.interventions import forms
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import score
from mllm_jax.report import figures, style, tables

COLUMNS = ("accuracy", "low", "high", "n", "chance")
MEASURES = ("options", "answers")


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
      captures: Captures to read during the prompts and generated answers.
    """
    context.require_choice("config.measure", config.measure, MEASURES)
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
        f"{name}-{wording}", functools.partial(answer, study, name, pictures, wording)
    )
    value, low, high = intervals.mean(step["right"].astype(float))
    count = len(step["right"])
    print(f"{name:10} {wording:9} {value:.3f} [{low:.3f}, {high:.3f}] of {count}")
    return {
        "accuracy": float(value), "low": float(low), "high": float(high), "n": count,
        "chance": float(step["chance"]),
    }  # fmt: skip


def answer(study: Context, name: str, pictures: list, wording: str) -> dict[str, np.ndarray]:
    """Answer the questions about a domain, and write the captures.

    Args:
      study: The study.
      name: The name of the domain.
      pictures: Its examples.
      wording: The style of the questions.

    Returns:
      `right`, bool[N], whether the answer is the right one; `chance`, the share of a guess.
    """
    pairs = batching.ask(pictures, (wording,))
    length = batching.row_length(study.processor, pairs)
    questions = batching.QuestionBatches(study.processor, pairs, study.config.batch_size, length)
    right, captured, batches = [], [], []
    label = f"{pictures[0].domain}, {wording}"
    for i in tqdm.tqdm(range(len(questions)), desc=label, leave=False):
        chosen, captures, batch = choose(study, questions[i], questions.candidates(i))
        right.append(chosen == questions.right(i))
        if study.captures:
            captured.append(jax.tree.map(np.asarray, captures))
            batches.append(batch.replace(pixels=None, features=None))
    if study.captures:
        joined = forms.join(study.captures, captured, batches)
        path = study.workdir / "captures" / f"{name}-{wording}.npz"
        context.write_captures(path, joined)
    chance = np.mean([1 / len(question.options) for _, question in pairs])
    return {"right": np.concatenate(right), "chance": np.asarray(chance)}


def choose(
    study: Context, batch: Batch, options: Sequence[tuple[str, ...]]
) -> tuple[np.ndarray, dict[str, Any], Batch]:
    """Return the option that the model gives each question, and what was captured.

    Args:
      study: The study.
      batch: The questions.
      options: The options of each question.

    Returns:
      int[n], the index of the option, -1 for an answer that names none or several; the captures;
      the batch that they are of, which includes a generated answer.
    """
    if study.config.measure == "options":
        out = score.score_with(study.model, batch, options, study.edits, study.captures)
        return np.asarray(out.values)[: len(options)].argmax(-1), out.captures, batch
    generated = mj.generate(
        study.model, batch, study.edits, study.captures, max_new_tokens=study.config.new_tokens,
        stop=True,
    )  # fmt: skip
    assert generated.text is not None  # the batch has a processor
    texts = zip(generated.text, options, strict=False)  # empty rows pad the batch
    chosen = np.array([answers.parse(text, own).id for text, own in texts])
    return chosen, generated.captures, generated.batch or batch
