"""Classification by a language model: prompts, free answers as classes, and scored classes.

pairs = [(e, answers.question(task, e, seed=0)) for e in task.test]
batches = batching.QuestionBatches(processor, pairs, size=8)
texts = answers.generate_answers(model, batches)
predicted = answers.parse_answers(texts, task.classes)              # int32[N], -1 for no class
likeliest = answers.score_classes(model, batches).argmax(-1)        # int64[N]
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import tqdm

from mllm_jax.data.batching import QuestionBatches
from mllm_jax.data.domains import Example
from mllm_jax.data.embedded import questions
from mllm_jax.data.tasks import Task
from mllm_jax.evaluation.metrics import text as text_
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import generate as generate_
from mllm_jax.passes import score as score_
from mllm_jax.processors.prompts import IMAGE

_CLASSIFY = (
    "Classify this image into one of the following categories relating to {topic}: {classes}. "
    "Only output a single final classification label and NOTHING ELSE."
)
# Verma et al. 2024: the prompt of the paper, with the classes separated by commas (it does not
# state how); that of its released code; and that of FT-Proj in this code, where LLaVA's template
# "plain" replaces the whole question by the picture.
WORDINGS = {
    "paper": _CLASSIFY,
    "released": _CLASSIFY + "\n\nOutput:",
    "plain": IMAGE,
}
NEAREST = 0.8  # lowest similarity at which an answer counts as a class that it does not name
PER = ("answer", "token")


def question(
    task: Task, example: Example, *, wording: str = "paper", seed: int = 0, epoch: int = 0
) -> questions.Question:
    """Return the question that asks for an example's class.

    Args:
      task: The task whose classes are listed.
      example: An example of the task.
      wording: One of WORDINGS. With "plain" the answer ends in a newline, as in LLaVA.
      seed: Seed of the order of the listed classes, which differs by example and epoch.
      epoch: Epoch of training.

    Returns:
      The question; its options are the classes in the order of their ids.
    """
    if wording not in WORDINGS:
        raise ValueError(f"unknown wording {wording!r}; known are {', '.join(WORDINGS)}")
    listed = questions.shuffled(task.classes, f"{seed} {epoch} {example.id}")
    if wording == "released":
        listed = [f'"{name}"' for name in listed]
    end = "\n" if wording == "plain" else ""
    return questions.Question(
        style="class",
        prompt=WORDINGS[wording].format(topic=task.topic, classes=", ".join(listed)),
        answer=example.label + end,
        options=tuple(name + end for name in task.classes),
    )


Rule = Literal["exact", "normalised", "named", "nearest", "none"]


class ParsedAnswer(NamedTuple):
    """An answer as a class.

    Attributes:
      id: Id of the class, -1 if the answer names none.
      how: The rule of `parse` that applied.
    """

    id: int
    how: Rule


def parse(answer: str, classes: Sequence[str], nearest: float = NEAREST) -> ParsedAnswer:
    """Return the class that a free answer names, by the first of these rules that applies.

    1. exact: the answer equals the class up to surrounding white space.
    2. normalised: it equals it up to case, punctuation, underscores and articles.
    3. named: the answer contains the words of the class in sequence, and those of no other class. A
       class within a longer one ("apple leaf" in "apple leaf rust") is named only if it also
       occurs elsewhere.
    4. nearest: no class is named, and exactly one class has the highest similarity to the
       normalised answer, of `nearest` or more: 1 - edit distance / length of the longer text.

    Otherwise, and if an answer names several classes, there is no class.

    Args:
      answer: The answer.
      classes: Names of the classes.
      nearest: Lowest similarity of the last rule.
    """
    if answer.strip() in classes:
        return ParsedAnswer(list(classes).index(answer.strip()), "exact")
    words, names = normalise(answer), [normalise(name) for name in classes]
    if not words:
        return ParsedAnswer(-1, "none")
    if names.count(words) == 1:
        return ParsedAnswer(names.index(words), "normalised")
    named = _named(words, names)
    if named:
        return ParsedAnswer(named.pop(), "named") if len(named) == 1 else ParsedAnswer(-1, "none")
    similarities = [_similarity(words, name) for name in names]
    best = max(similarities)
    if best >= nearest and similarities.count(best) == 1:
        return ParsedAnswer(similarities.index(best), "nearest")
    return ParsedAnswer(-1, "none")


def parse_answers(
    answers: Sequence[str], classes: Sequence[str], nearest: float = NEAREST
) -> np.ndarray:
    """Return the class id of each answer, int32[N], -1 where it names none; see `parse`."""
    return np.array([parse(answer, classes, nearest).id for answer in answers], np.int32)


def rules(
    answers: Sequence[str], classes: Sequence[str], nearest: float = NEAREST
) -> dict[Rule, int]:
    """Count the answers to which each rule of `parse` applied."""
    counts = collections.Counter(parse(answer, classes, nearest).how for answer in answers)
    return {rule: counts[rule] for rule in get_args(Rule)}


def normalise(text: str) -> str:
    """Return a text in lower case, without punctuation, underscores, articles and extra spaces.

    Articles stay in a text without other words, such as the letter of option A.
    """
    words = re.findall(r"[^\W_]+", text.lower())
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _named(text: str, names: Sequence[str]) -> set[int]:
    """Return the classes whose words are in a text, the longest first; each word counts once."""
    named: set[int] = set()
    for name in sorted(filter(None, names), key=lambda name: (-len(name), name)):
        remaining = re.sub(rf"(?<!\S){re.escape(name)}(?!\S)", "|", text)
        if remaining != text:
            named |= {number for number, other in enumerate(names) if other == name}
        text = remaining
    return named


def _similarity(a: str, b: str) -> float:
    return 1 - text_.levenshtein(a, b) / max(len(a), len(b), 1)


def generate_answers(
    model: Any,
    batches: QuestionBatches,
    edits: Edits | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> list[str]:
    """Generate the model's answer to each question.

    Args:
      model: The model.
      batches: The questions.
      edits: Interventions during generation.
      max_new_tokens: By default the number of tokens of the longest class plus eight.
      temperature: 0 is greedy; the released code samples at 0.2, which needs a `key`.
      key: A `jax.random.key`, into which the number of each batch is folded.

    Returns:
      A text for each question.
    """
    if max_new_tokens is None:
        max_new_tokens = _candidates(batches, end=True).shape[-1] + 8
    texts: list[str] = []
    for number in tqdm.tqdm(range(len(batches)), desc="answers", leave=False):
        batch_key = None if key is None else jax.random.fold_in(key, number)
        generated = generate_.generate(
            model, batches[number], edits, max_new_tokens=max_new_tokens, stop=True,
            temperature=temperature, key=batch_key,
        )  # fmt: skip
        assert generated.text is not None  # the batches have a processor
        texts += generated.text[: len(batches.rows(number))]
    return texts


def score_classes(
    model: Any,
    batches: QuestionBatches,
    edits: Edits | None = None,
    *,
    per: Literal["answer", "token"] = "answer",
    end: bool = True,
) -> np.ndarray:
    """Compute the log-likelihood of each class as the answer; the prompt is computed once.

    Args:
      model: The model.
      batches: The questions, all with the same classes.
      edits: Interventions during the pass.
      per: "answer" is the log-likelihood of the whole answer, which is lower for longer classes.
        "token" divides it by the number of tokens, which favours long classes whose ends follow
        from their beginnings.
      end: Whether the end-of-turn token is scored too. Without it, a class that is a prefix of
        another class is never less likely than the other.

    Returns:
      float32[N, C].
    """
    if per not in PER:
        raise ValueError(f"per={per!r} is not one of {', '.join(PER)}")
    ids = _candidates(batches, end)
    length = (ids >= 0).sum(-1) if per == "token" else 1
    ids = np.broadcast_to(ids, (batches.size, *ids.shape))
    scores = []
    for number in tqdm.tqdm(range(len(batches)), desc="scores", leave=False):
        values = np.asarray(score_.score(model, batches[number], ids, edits))
        scores.append(values[: len(batches.rows(number))] / length)
    return np.concatenate(scores).astype(np.float32)


def _candidates(batches: QuestionBatches, end: bool) -> np.ndarray:
    """Return the tokens of the classes, int32[C, A], padded with -1."""
    options = {question.options for _, question in batches.pairs}
    if len(options) != 1:
        raise ValueError(f"the questions have {len(options)} lists of classes, not one")
    return score_.candidate_ids(batches.processor, list(options.pop()), 1, end=end)[0]
