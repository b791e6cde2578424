"""Sequences of batches: made when asked for, always the same at the same place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mllm_jax.processors.processor import Processor


def interleave(lists: Sequence[Sequence]) -> list:
    """One of each in turn, spread evenly: long lists do not come last."""
    placed = [
        ((i + 0.5) / len(items), number, item)
        for number, items in enumerate(lists)
        for i, item in enumerate(items)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


@dataclasses.dataclass(frozen=True)
class PackedQuestions:
    """Training batches: several questions of one picture in a row, the picture read once.

    Attributes:
      examples: with questions. features: float[N, P, E] of them.
      size: pictures in a batch. steps: batches. questions: of each picture, chosen anew each epoch.
      styles: of the questions that are asked; all by default.
      seed: of the order; None goes through the examples as they stand, first questions first.
    """

    processor: Processor
    examples: Sequence[Any]
    features: np.ndarray
    size: int
    steps: int
    questions: int
    seed: int | None
    styles: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int):
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        at = np.arange(step * self.size, (step + 1) * self.size)
        epochs, places = np.divmod(at, len(self.examples))
        rows = [self._order(epoch)[i] for epoch, i in zip(epochs, places, strict=True)]
        turns = [self._turns(row, step) for row in rows]
        features = np.stack([self.features[row] for row in rows])
        sizes = None
        if self.processor.config.pinpoints:  # a picture is cut by its size
            sizes = [self.examples[row].image.size[::-1] for row in rows]
        return self.processor.pack(None, turns, features=features, sizes=sizes, length=self._length)

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.examples))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))

    def _turns(self, row: int, step: int) -> list[tuple[str, str]]:
        asked = self._asked(self.examples[row])
        chosen = np.arange(len(asked))
        if self.seed is not None:
            chosen = np.random.default_rng([self.seed, row, step]).permutation(chosen)
        return [(asked[i].prompt, asked[i].answer) for i in chosen[: self.questions]]

    def _asked(self, example) -> list:
        return [q for q in example.questions if not self.styles or q.style in self.styles]

    @functools.cached_property
    def _length(self) -> int:
        """One length for all batches, so that training compiles once."""
        return packed_length(self.processor, map(self._asked, self.examples), self.questions)


def packed_length(processor: Processor, asked: Iterable[Sequence[Any]], questions: int) -> int:
    """Tokens of the longest packed row, rounded up to a multiple of 8.

    Args:
      processor: its processor.
      asked: the questions of each example.
      questions: how many of them share a row.
    """
    most = 0
    one = _blank(processor, 1)
    shared = None
    sizes: dict[tuple[str, str], int] = {}
    for some in asked:
        lengths = []
        for question in some:
            pair = (question.prompt, question.answer)
            if pair not in sizes:
                batch = processor.pack(None, [[pair]], **one)
                sizes[pair] = int((batch.segment > 0).sum())
                shared = int(batch.valid.sum()) - sizes[pair]
            lengths.append(sizes[pair])
        most = max(most, sum(sorted(lengths)[-questions:]))
    return -(-((shared or 0) + most) // 8) * 8


def ask(examples: Sequence[Any], styles: Sequence[str]) -> list[tuple[Any, Any]]:
    """(example, question) pairs: each example one question, the styles that it has in turn."""
    return list(ExampleQuestions(examples, tuple(styles)))


@dataclasses.dataclass(frozen=True)
class ExampleQuestions(Sequence):
    """The pairs of `ask`, each made when it is asked for: pictures stay where they are.

    Attributes:
      examples: with questions. styles: of the questions that are asked.
      count: how many at most.
    """

    examples: Sequence[Any]
    styles: tuple[str, ...]
    count: int | None = None

    def __len__(self) -> int:
        return len(self.examples) if self.count is None else min(self.count, len(self.examples))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        example = self.examples[i]
        has = [s for s in self.styles if any(q.style == s for q in example.questions)]
        if not has:
            raise ValueError(
                f"{example.domain}/{example.id} has no question of style {' or '.join(self.styles)}"
            )
        style = has[i % len(has)]
        asked = [q for q in example.questions if q.style == style]
        return example, asked[i // len(has) % len(asked)]


@dataclasses.dataclass(frozen=True)
class QuestionBatches:
    """Batches of one question a row, all of one shape; the last is filled up with empty rows.

    Attributes:
      pairs: (example, question), see `ask`.
      size: rows of a batch. length: tokens of a row.
      features: float[N, P, E], of the examples of the pairs; pictures are not opened then.
      filled: rows that every batch is filled up to, such as a mesh divides; `size` by default.
    """

    processor: Processor
    pairs: Sequence[tuple[Any, Any]]
    size: int
    length: int | None = None
    features: np.ndarray | None = None
    filled: int | None = None

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.size)

    def __getitem__(self, number: int):
        rows = self.rows(number)
        prompts = [question.prompt for _, question in rows]
        shape = {"rows": self.filled or self.size, "length": self.length}
        if self.features is None:
            return self.processor([example.image for example, _ in rows], prompts, **shape)
        features = self.features[number * self.size :][: len(rows)]
        return self.processor(None, prompts, features=np.asarray(features), **shape)

    def rows(self, number: int) -> Sequence[tuple[Any, Any]]:
        """The pairs of a batch."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        return self.pairs[number * self.size : (number + 1) * self.size]

    def candidates(self, number: int) -> list[tuple[str, ...]]:
        """The options of each row."""
        return [question.options for _, question in self.rows(number)]

    def right(self, number: int) -> np.ndarray:
        """int[rows]: which option is the right one."""
        return np.array([q.options.index(q.answer) for _, q in self.rows(number)])


def row_length(
    processor: Processor, pairs: Sequence[tuple[Any, Any]], *, answers: bool = False
) -> int:
    """Tokens of the longest prompt of all pairs, with its answer if asked; a multiple of 8."""
    asked = sorted({(q.prompt, q.answer) if answers else (q.prompt, "") for _, q in pairs})
    prompts, said = ([pair[i] for pair in asked] for i in (0, 1))
    how = _blank(processor, len(prompts)) | ({"answers": said} if answers else {})
    longest = processor(None, prompts, **how).valid.sum(-1).max()
    return int(-(-longest // 8) * 8)


def _blank(processor: Processor, pictures: int) -> dict[str, Any]:
    """What stands for pictures while tokens are counted: the largest that there are."""
    features = np.zeros((pictures, processor.config.tiles, 1), np.float32)
    return {"features": features, "sizes": [processor.config.largest] * pictures}
