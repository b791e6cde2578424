"""The metrics of MMNeuron's released code, oddities included: for comparison with its numbers.

Each gives one number a question; the paper's figure is their mean. What differs from the standard
metric, and why the standard one is the default, is told in docs/official.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm_jax.evaluation.metrics import text
from mllm_jax.evaluation.metrics.lingo_judge import Judge


def anls(prediction: str, answers: Sequence[str]) -> float:
    """ANLS without a cut: any common character is worth something."""
    return text.anls(prediction, answers, threshold=1.0)


def option_letter(prediction: str, label: str) -> int:
    """How many characters of the answer are the right letter: may exceed 1, and reads words."""
    text.strings([prediction, label], "texts")
    return prediction.count(label) if label in tuple("ABCDE") else 0


def vqa(prediction: str, answers: Sequence[str], confidence: Sequence[str]) -> float:
    """1 if any person who was sure gave this very answer, but for case."""
    text.strings([prediction], "prediction")
    text.strings(answers, "answers")
    if not len(answers):
        raise ValueError("VQA accuracy needs people's answers, got none")
    if len(confidence) != len(answers):
        raise ValueError(f"{len(confidence)} confidences for {len(answers)} answers")
    sure = [a.lower() for a, c in zip(answers, confidence, strict=True) if c == "yes"]
    return float(prediction.lower() in sure)


def exact_match(prediction: str, answer: str) -> float:
    """1 if equal but for case; white space counts."""
    text.strings([prediction, answer], "texts")
    return float(prediction.lower() == answer.lower())


def lingo_judge(
    judge: Judge,
    ids: Sequence[str],
    questions: Sequence[str],
    references: Sequence[str],
    predictions: Sequence[str],
) -> dict[str, float]:
    """1 for a question of which any row is right: each row has a prediction and one reference.

    Args:
        judge: gets the texts as they are, in their own case.
        ids: [N], of the question that a row asks; rows that share it are one question.
        questions, references, predictions: [N].

    Returns:
        By id, in order of appearance.
    """
    if not len(ids):
        raise ValueError("there is no question to judge")
    rows = {"questions": questions, "references": references, "predictions": predictions}
    for name, texts in rows.items():
        text.strings(texts, name)
        if len(texts) != len(ids):
            raise ValueError(f"{len(texts)} {name} for {len(ids)} ids; each row needs one of each")
    right: dict[str, float] = {}
    for key, *row in zip(ids, questions, references, predictions, strict=True):
        right[key] = max(right.get(key, 0.0), float(judge.judged(*row) > 0.5))
    return right
