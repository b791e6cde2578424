"""Metrics of short answers: ANLS, option letters, exact match; and averages by type of question.

Each gives one number a question, so that `mllm_jax.analysis.intervals` puts intervals on the mean
and tests differences on pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def anls(prediction: str, answers: Sequence[str], threshold: float | None = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer (ST-VQA, Biten et al. 2019).

    Case does not count, and any white space is one space.

    Args:
        prediction: what the model says.
        answers: what is right, any of them.
        threshold: from this normalised distance on, an answer is worth nothing; None cuts nothing.

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
    """Refuses what is no list of texts, such as one text, which would be read letter by letter.

    Args:
        texts: what is given.
        name: of the argument, for the error.
    """
    if isinstance(texts, str) or not isinstance(texts, (list, tuple, np.ndarray)):
        raise ValueError(f"{name} must be a list of texts, got {type(texts).__name__}")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{place}] is {text!r:.40}, no text")


def levenshtein(a: str, b: str) -> int:
    """Characters to insert, delete or replace to make one text of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def option_letter(
    prediction: str, options: Sequence[str] = (), letters: str = "ABCD"
) -> str | None:
    """The option that an answer names.

    In this order: the answer begins with a letter that stands alone ("B", "(b) ...", "B: a lung");
    it says "answer is B" or "option B"; it is the text of one option; a capital letter stands alone
    in it ("I choose C."), where "A" before another word is an article.

    Args:
        prediction: what the model says.
        options: their texts, with or without "A:" in front.
        letters: of the options, in order.

    Returns:
        The letter, or None if it names none.
    """
    strings([prediction], "prediction")
    strings(options, "options")
    text = prediction.strip()
    one = f"[{letters}{letters.lower()}]"
    if found := re.match(rf"\(?({one})(?:[).:,\n]|\s*$)", text):
        return found[1].upper()
    if found := re.search(rf"\b(?:answer is|answer:|option|choice)\s*\(?([{letters}])\b", text):
        return found[1]
    bare = [re.sub(rf"^\s*{one}\s*[:.)]", "", option) for option in options]
    same = [letter for letter, option in zip(letters, bare) if _plain(option) == _plain(text)]
    if len(same) == 1:
        return same[0]
    alone = re.findall(rf"\b(?!A\s+\w)([{letters}])\b(?!')", text)
    return alone[0] if alone else None


def exact_match(prediction: str, answer: str) -> bool:
    """Equal but for case and white space around."""
    strings([prediction, answer], "texts")
    return prediction.strip().lower() == answer.strip().lower()


class ByType(NamedTuple):
    """Means of a metric.

    Attributes:
        overall: over all questions.
        average: over the types, each counted once.
        types: of each type, in alphabetic order.
        questions: how many each type has.
    """

    overall: float
    average: float
    types: dict[str, float]
    questions: dict[str, int]


def by_type(values: Sequence[float], types: Sequence[str]) -> ByType:
    """Means over all questions, over each type of question, and over the types.

    Args:
        values: [N], of each question.
        types: [N], its type, such as "count".
    """
    values, types = np.asarray(values, np.float64), np.asarray(types, np.str_)
    if not values.size or values.shape != types.shape:
        raise ValueError(f"{values.size} values for {types.size} types; both need one a question")
    if not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(f"values{place} is {values[tuple(place)]}; every value must be finite")
    names = [str(name) for name in np.unique(types)]
    means = {name: float(values[types == name].mean()) for name in names}
    questions = {name: int((types == name).sum()) for name in names}
    return ByType(float(values.mean()), float(np.mean(list(means.values()))), means, questions)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
