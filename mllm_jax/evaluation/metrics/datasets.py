"""The metric of each data set of MMNeuron, in its standard form and in that of the release.

datasets.score("docvqa", predictions, questions)                       # float64[N]
datasets.score("docvqa", predictions, questions, compat="official")    # as in the release
datasets.name("docvqa", compat="official")                             # the metric's name
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.data.vqa.questions import VqaQuestion
from mllm_jax.evaluation.metrics import official, text, vqa
from mllm_jax.evaluation.metrics.lingo_judge import Judge

_STANDARD = {
    "docvqa": ("ANLS (threshold 0.5)", lambda said, q: text.anls(said, q.answers)),
    "pmc_vqa": (
        "option letter",
        lambda said, q: text.option_letter(said, q.choices, "".join(q.options)) == q.answer,
    ),
    "rsvqa_hr": ("exact match", lambda said, q: text.exact_match(said, q.answer)),
    "vqav2": ("VQA accuracy", lambda said, q: vqa.accuracy(said, q.answers)),
}
_OFFICIAL = {
    "docvqa": ("ANLS (no threshold)", lambda said, q: official.anls(said, q.answers)),
    "pmc_vqa": (
        "occurrences of the right letter",
        lambda said, q: official.option_letter(said, q.answer),
    ),
    "rsvqa_hr": ("exact match", lambda said, q: official.exact_match(said, q.answer)),
    "vqav2": (
        "in a sure person's answers",
        lambda said, q: official.vqa(said, q.answers, q.confidence),
    ),
}
NAMES = ("lingoqa", *sorted(_STANDARD))


def score(
    dataset: str,
    predictions: Sequence[str],
    questions: Sequence[VqaQuestion],
    *,
    judge: Judge | None = None,
    compat: str | None = None,
) -> np.ndarray:
    """Compute the metric of every question.

    Args:
      dataset: One of NAMES.
      predictions: [N], the model's answers.
      questions: [N], the questions.
      judge: The judge of lingoqa; see `mllm_jax.evaluation.metrics.lingo_judge.load`.
      compat: None for the standard metric, "official" for that of MMNeuron's release.

    Returns:
      float64[N]. For lingoqa the standard metric judges each row by the references of all rows
      with the same question; the official one is float64[questions], 1 if any row is correct.
    """
    table = _table(dataset, compat)
    if len(predictions) != len(questions) or not len(questions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(questions)} questions of {dataset}; "
            "each question needs one prediction"
        )
    text.strings(predictions, "predictions")
    if dataset != "lingoqa":
        metric = table[dataset][1]
        return np.array([metric(*pair) for pair in zip(predictions, questions)], np.float64)
    if judge is None:
        raise ValueError("lingoqa is judged by a classifier: pass judge=lingo_judge.load()")
    ids = [question.id for question in questions]
    if compat:
        texts, answers = [q.text for q in questions], [q.answer for q in questions]
        right = official.lingo_judge(judge, ids, texts, answers, predictions)
        return np.array(list(right.values()), np.float64)
    references: dict[str, list[str]] = collections.defaultdict(list)
    for question in questions:
        references[question.id].extend(question.answers)
    return np.array(
        [judge.right(q.text, references[q.id], p) for p, q in zip(predictions, questions)],
        np.float64,
    )


def name(dataset: str, *, judge: Judge | None = None, compat: str | None = None) -> str:
    """Return the name of the metric for a table; for lingoqa that of the judge."""
    table = _table(dataset, compat)
    if dataset != "lingoqa":
        return table[dataset][0]
    judged = judge.name if judge else "Lingo-Judge"
    return f"{judged}, any row of a question" if compat else judged


def _table(dataset: str, compat: str | None) -> Mapping[str, tuple[str, Callable[..., Any]]]:
    if dataset not in NAMES:
        raise ValueError(f"unknown data set {dataset!r}; known are {', '.join(NAMES)}")
    if compat not in (None, "official"):
        raise ValueError(f"compat={compat!r} is neither None nor 'official'")
    return _OFFICIAL if compat else _STANDARD
