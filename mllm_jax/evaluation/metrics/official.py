"""The metrics of MMNeuron's released code, including its errors, to compare with its numbers.

Each returns one number per question; the paper reports their mean. docs/official.md explains how
they differ from the standard metrics, and why those are the default.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm_jax.evaluation.metrics import text
from mllm_jax.evaluation.metrics.lingo_judge import Judge


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Compute ANLS without a threshold: any common character counts."""
    return text.anls(prediction, answers, threshold=1.0)


def option_letter(prediction: str, label: str) -> int:
    """Count the characters of the answer, within words too, that are the correct letter."""
    text.strings([prediction, label], "texts")
    return prediction.count(label) if label in tuple("ABCDE") else 0


def vqa(prediction: str, answers: Sequence[str], confidence: Sequence[str]) -> float:
    """Return 1 if any person who was sure gave this answer, up to case."""
    text.strings([prediction], "prediction")
    text.strings(answers, "answers")
    if not len(answers):
        raise ValueError("VQA accuracy needs people's answers, got none")
    if len(confidence) != len(answers):
        raise ValueError(f"{len(confidence)} confidences for {len(answers)} answers")
    sure = [a.lower() for a, c in zip(answers, confidence, strict=True) if c == "yes"]
    return float(prediction.lower() in sure)


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if the texts are equal up to case; white space counts."""
    text.strings([prediction, answer], "texts")
    return float(prediction.lower() == answer.lower())


def lingo_judge(
    judge: Judge,
    ids: Sequence[str],
    questions: Sequence[str],
    references: Sequence[str],
    predictions: Sequence[str],
) -> dict[str, float]:
    """Return 1 for each question of which any row is correct.

    Args:
      judge: The judge, which reads the texts in their own case.
      ids: [N], id of the question of each row; rows that share it are one question.
      questions: [N], the question of each row.
      references: [N], its reference answer.
      predictions: [N], the model's answer.

    Returns:
      {id: 0.0 or 1.0}, in order of appearance.
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
