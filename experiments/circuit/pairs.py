"""Minimal pairs: two inputs of one layout with different answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from experiments.examples import Side, pair_up
from mllm_jax import tokens as tok
from mllm_jax.batch import Batch
from mllm_jax.data.domains import Example
from mllm_jax.processors.processor import Processor

Partner = Literal["class", "domain"]
SWAPS = ("picture", "question")
PARTNERS = ("class", "domain")


class Answers(NamedTuple):
    """The answers of a pair as tokens.

    Attributes:
      shared: The tokens of their common beginning.
      right: The next token of the clean answer.
      wrong: The next token of the corrupt answer.
    """

    shared: tuple[int, ...]
    right: int
    wrong: int


class Pair(NamedTuple):
    """A clean and a corrupt input, and their answers."""

    clean: Side
    corrupt: Side
    answers: Answers


def answers_of(processor: Processor, clean: Side, corrupt: Side) -> Answers | None:
    """Return the first tokens at which two answers differ; None if they are equal."""
    first, second = (processor.answer_ids(side[1].answer) for side in (clean, corrupt))
    for at, (right, wrong) in enumerate(zip(first, second, strict=False)):
        if right != wrong:
            return Answers(tuple(first[:at]), right, wrong)
    return None


def swap_pictures(processor: Processor, sides: Sequence[Side], partner: Partner) -> list[Pair]:
    """Return pairs of pictures with the same question and different answers.

    Args:
      processor: The processor of the model.
      sides: Pictures with their questions; each is in at most one pair.
      partner: "class" pairs pictures of one domain, "domain" pictures of two.

    Raises:
      ValueError: There is no pair.
    """

    def fits(side: Side, other: Side) -> bool:
        same_domain = side[0].domain == other[0].domain
        if side[1].prompt != other[1].prompt or same_domain != (partner == "class"):
            return False
        return answers_of(processor, side, other) is not None

    found = [
        Pair(side, other, answers)
        for side, other in pair_up(sides, fits)
        if (answers := answers_of(processor, side, other))
    ]
    if not found:
        where = "of one domain" if partner == "class" else "of two domains"
        raise ValueError(
            f"config.partner={partner}: no two pictures {where} have the same question and "
            "different answers; give other config.styles, or more pictures"
        )
    return found


def swap_questions(
    processor: Processor, examples: Sequence[Example], styles: Sequence[str]
) -> list[Pair]:
    """Return pairs of questions about one picture, equally long and with different answers.

    Args:
      processor: The processor of the model.
      examples: The pictures; each is in at most one pair.
      styles: The styles of the questions.

    Raises:
      ValueError: There is no pair.
    """
    found: list[Pair] = []
    for example in examples:
        questions = [q for q in example.questions if q.style in styles]
        if len(questions) < 2:
            continue
        picture, prompts = example.image, [q.prompt for q in questions]
        lengths = processor([picture] * len(prompts), prompts).valid.sum(-1)
        for i, j in np.argwhere(np.triu(lengths[:, None] == lengths, 1)).tolist():
            if questions[i].prompt == questions[j].prompt:
                continue
            # In turn, so that "yes" is the clean answer of every other pair.
            order = (i, j) if len(found) % 2 == 0 else (j, i)
            clean, corrupt = ((example, questions[at]) for at in order)
            if answers := answers_of(processor, clean, corrupt):
                found.append(Pair(clean, corrupt, answers))
                break
    if not found:
        raise ValueError(
            f"config.swap=question: no picture has two questions of style {' or '.join(styles)} "
            "of equally many tokens with different answers; give other config.styles or pictures"
        )
    return found


def after_shared(batch: Batch, shared: Sequence[Sequence[int]], length: int) -> Batch:
    """Return a batch of prompts followed by the first tokens of their answers.

    The last of these becomes the last token of its row.

    Args:
      batch: The prompts, padded on the right.
      shared: The tokens that follow each prompt.
      length: The number of places for them.
    """
    if not length:
        return batch
    counts = np.array([len(ids) for ids in shared])
    ids = np.array([[*ids, *[0] * (length - len(ids))] for ids in shared], np.int32)
    longer = batch.prompts().followed_by(ids, np.arange(length) < counts[:, None])
    at = np.where(counts > 0, batch.ids.shape[1] + counts - 1, batch.last)
    last = np.arange(longer.ids.shape[1]) == at[:, None]
    # A prompt from here on: masks of tokens are of the whole row.
    map_: tok.TokenMap = dataclasses.replace(longer.tokens, last=last, added=0)
    return longer.replace(tokens=map_)
