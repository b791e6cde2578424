"""Classification by a language model: prompts, free answers as classes, and scored classes.

asked = [(e, answers.question(task, e, seed=0)) for e in task.test]
batches = batching.Asked(processor, asked, size=8)
texts = answers.free(model, batches)                       # what it says
said = answers.read(texts, task.classes)                   # int32[N], -1 for no class
best = answers.scores(model, batches).argmax(-1)           # which class it finds most likely
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

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
# Verma et al. 2024: what the paper prints, with the classes between commas (it does not say how);
# the text of its released code; and what FT-Proj reads in that code, where LLaVA's template "plain"
# puts the picture in the place of the whole question.
WORDINGS = {
    "paper": _CLASSIFY,
    "released": _CLASSIFY + "\n\nOutput:",
    "plain": IMAGE,
}
NEAREST = 0.8  # similarity from which on an answer is taken for a class that it does not name
PER = ("answer", "token")


def question(
    task: Task, example: Example, *, wording: str = "paper", seed: int = 0, epoch: int = 0
) -> questions.Question:
    """The question that asks for an example's class.

    Args:
        task: whose classes are listed.
        example: of the task.
        wording: one of WORDINGS. Of "plain" the answer ends in a newline, as LLaVA has it.
        seed: of the order in which the classes are listed: another for each example and epoch.
        epoch: of training.

    Returns:
        The question; its options are the classes in the order of their ids.
    """
    if wording not in WORDINGS:
        raise ValueError(f"unknown wording {wording!r}; there are {', '.join(WORDINGS)}")
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


class ParsedAnswer(NamedTuple):
    """An answer as a class.

    Attributes:
        id: of the class, -1 if the answer names none.
        how: "exact", "normalised", "named", "nearest" or "none"; see `parse`.
    """

    id: int
    how: str


def parse(answer: str, classes: Sequence[str], nearest: float = NEAREST) -> ParsedAnswer:
    """The class that a free answer names, by the first of these rules that holds.

    1. exact: the answer is the class, but for white space around it.
    2. normalised: it is, but for case, punctuation, underscores and articles.
    3. named: the words of the class stand together in the answer, and those of no other class. A
       class within a longer one ("apple leaf" in "apple leaf rust") is named only if it also
       stands elsewhere.
    4. nearest: no class is named, and of one class alone the normalised text has a similarity of
       `nearest` or more: 1 - edit distance / length of the longer text.

    All else is none, an answer that names several classes as well.
    """
    if answer.strip() in classes:
        return ParsedAnswer(list(classes).index(answer.strip()), "exact")
    said, names = normalise(answer), [normalise(name) for name in classes]
    if names.count(said) == 1:
        return ParsedAnswer(names.index(said), "normalised")
    named = _named(said, names)
    if named:
        return ParsedAnswer(named.pop(), "named") if len(named) == 1 else ParsedAnswer(-1, "none")
    likeness = [_likeness(said, name) for name in names]
    best = max(likeness)
    if best >= nearest and likeness.count(best) == 1:
        return ParsedAnswer(likeness.index(best), "nearest")
    return ParsedAnswer(-1, "none")


def parse_answers(
    answers: Sequence[str], classes: Sequence[str], nearest: float = NEAREST
) -> np.ndarray:
    """int32[N]: the class id of each answer, -1 where it names none; see `parse`."""
    return np.array([parse(answer, classes, nearest).id for answer in answers], np.int32)


def rules(answers: Sequence[str], classes: Sequence[str], nearest: float = NEAREST) -> dict:
    """How many answers each rule of `parse` read."""
    found = collections.Counter(parse(answer, classes, nearest).how for answer in answers)
    return {how: found[how] for how in ("exact", "normalised", "named", "nearest", "none")}


def normalise(text: str) -> str:
    """Lower case, words with one space between them; no punctuation, underscores or articles."""
    words = re.findall(r"[^\W_]+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _named(said: str, names: Sequence[str]) -> set[int]:
    """The classes whose words stand in a text, the longest first; each word counts once."""
    found = set()
    for name in sorted(filter(None, names), key=lambda name: (-len(name), name)):
        left = re.sub(rf"(?<!\S){re.escape(name)}(?!\S)", "|", said)
        if left != said:
            found |= {at for at, other in enumerate(names) if other == name}
        said = left
    return found


def _likeness(a: str, b: str) -> float:
    return 1 - text_.levenshtein(a, b) / max(len(a), len(b), 1)


def generate_answers(
    model,
    batches: QuestionBatches,
    edits: Edits | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    key=None,
) -> list[str]:
    """What the model says to each question.

    Args:
        max_new_tokens: by default eight more than the longest class has.
        temperature: 0 is greedy; the released code samples at 0.2, which needs a `key`.
        key: a `jax.random.key`; each batch folds its number in.
    """
    if max_new_tokens is None:
        max_new_tokens = _candidates(batches, end=True).shape[-1] + 8
    texts = []
    for number in tqdm.tqdm(range(len(batches)), desc="answers", leave=False):
        fresh = None if key is None else jax.random.fold_in(key, number)
        made = generate_.generate(
            model, batches[number], edits, max_new_tokens=max_new_tokens, stop=True,
            temperature=temperature, key=fresh,
        )  # fmt: skip
        texts += made.text[: len(batches.rows(number))]
    return texts


def score_classes(
    model,
    batches: QuestionBatches,
    edits: Edits | None = None,
    *,
    per: str = "answer",
    end: bool = True,
) -> np.ndarray:
    """float32[N, C]: how likely each class is as the answer; the prompt is read once for all.

    Args:
        per: "answer", the log-likelihood of the whole: nothing is normalised, and a long class pays
            for each of its tokens. "token": that divided by its number of tokens, which favours
            long classes whose ends follow from their beginnings.
        end: whether the end of turn counts, as a token. Without, a class that another begins with
            is never less likely than that other.
    """
    if per not in PER:
        raise ValueError(f"per={per!r} is none of {', '.join(PER)}")
    ids = _candidates(batches, end)
    length = (ids >= 0).sum(-1) if per == "token" else 1
    ids = np.broadcast_to(ids, (batches.size, *ids.shape))
    found = []
    for number in tqdm.tqdm(range(len(batches)), desc="scores", leave=False):
        values = np.asarray(score_.score(model, batches[number], ids, edits))
        found.append(values[: len(batches.rows(number))] / length)
    return np.concatenate(found).astype(np.float32)


def _candidates(batches: QuestionBatches, end: bool) -> np.ndarray:
    """int32[C, A]: the classes as tokens, filled up with -1."""
    options = {question.options for _, question in batches.pairs}
    if len(options) != 1:
        raise ValueError(f"the questions have {len(options)} lists of classes, not one")
    return score_.candidate_ids(batches.processor, list(options.pop()), 1, end=end)[0]
