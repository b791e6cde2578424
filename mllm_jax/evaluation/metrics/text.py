"""Metrics of short answers: ANLS, option letters, exact match; and averages by type of question.

Each returns one number per question, from which `mllm_jax.analysis.intervals` computes intervals of
the mean and tests of paired differences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def anls(prediction: str, answers: Sequence[str], threshold: float | None = 0.5) -> float:
    """Compute the normalised Levenshtein similarity to the nearest answer (ANLS, ST-VQA 2019).

    Case does not count, and any white space is one space.

    Args:
      prediction: The model's answer.
      answers: The correct answers.
      threshold: Normalised distance from which the similarity is 0; None for no threshold.

    Returns:
      1 - distance / length of the longer text, 0 to 1; 1 for two empty texts.
    """
    strings([prediction], "prediction")
    strings(answers, "answers")
    if not len(answers):
        raise ValueError("ANLS needs at least one answer, got none")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} lies outside (0, 1]; None cuts nothing")
    prediction, *answers = (" ".join(text.lower().split()) for text in (prediction, *answers))
    distances = [
        levenshtein(prediction, answer) / max(len(prediction), len(answer), 1) for answer in answers
    ]
    nearest = min(distances)
    return 1 - nearest if threshold is None or nearest < threshold else 0.0


def strings(texts: Sequence[str], name: str) -> None:
    """Raise an error unless an argument is a list of strings; a single string is refused too.

    Args:
      texts: The argument.
      name: Its name, for the error message.
    """
    if isinstance(texts, str) or not isinstance(texts, (list, tuple, np.ndarray)):
        raise ValueError(f"{name} must be a list of strings, got {type(texts).__name__}")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{place}] is {text!r:.40}, not a string")


def levenshtein(a: str, b: str) -> int:
    """Count the insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def option_letter(
    prediction: str, options: Sequence[str] = (), letters: str = "ABCD"
) -> str | None:
    """Return the option that an answer names.

    These rules apply in order: the answer begins with a single letter ("B", "(b) ...", "B: a
    lung"); it contains "answer is B" or "option B"; it is the text of one option; it contains a
    single capital letter ("I choose C."), where "A" before another word is an article.

    Args:
      prediction: The model's answer.
      options: Texts of the options, with or without a prefix "A:".
      letters: Letters of the options, in order.

    Returns:
      The letter, or None if it names none.
    """
    strings([prediction], "prediction")
    strings(options, "options")
    text = prediction.strip()
    any_letter = f"[{letters}{letters.lower()}]"
    if match := re.match(rf"\(?({any_letter})(?:[).:,\n]|\s*$)", text):
        return match[1].upper()
    if match := re.search(rf"\b(?:answer is|answer:|option|choice)\s*\(?([{letters}])\b", text):
        return match[1]
    bare = [re.sub(rf"^\s*{any_letter}\s*[:.)]", "", option) for option in options]
    same = [letter for letter, option in zip(letters, bare) if _plain(option) == _plain(text)]
    if len(same) == 1:
        return same[0]
    alone = re.findall(rf"\b(?!A\s+\w)([{letters}])\b(?!')", text)
    return alone[0] if alone else None


def exact_match(prediction: str, answer: str) -> bool:
    """Return whether the texts are equal up to case and surrounding white space."""
    strings([prediction, answer], "texts")
    return prediction.strip().lower() == answer.strip().lower()


class ByType(NamedTuple):
    """Means of a metric by type of question.

    Attributes:
      overall: Mean over all questions.
      average: Mean over the means of the types.
      types: Mean of each type, in alphabetic order.
      questions: Number of questions of each type.
    """

    overall: float
    average: float
    types: dict[str, float]
    questions: dict[str, int]


def by_type(values: ArrayLike, types: ArrayLike) -> ByType:
    """Compute the means over all questions, over each type of question, and over the types.

    Args:
      values: float[N], the metric of each question.
      types: str[N], its type, such as "count".
    """
    metric, kinds = np.asarray(values, np.float64), np.asarray(types, np.str_)
    if not metric.size or metric.shape != kinds.shape:
        raise ValueError(f"{metric.size} values for {kinds.size} types; both need one per question")
    if not np.isfinite(metric).all():
        place = np.argwhere(~np.isfinite(metric))[0].tolist()
        raise ValueError(f"values{place} is {metric[tuple(place)]}; every value must be finite")
    names = [str(name) for name in np.unique(kinds)]
    means = {name: float(metric[kinds == name].mean()) for name in names}
    questions = {name: int((kinds == name).sum()) for name in names}
    return ByType(float(metric.mean()), float(np.mean(list(means.values()))), means, questions)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
