"""Sequences of batches, which are made on demand and reproducible by index."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.data.domains import Example
from mllm_jax.data.embedded.questions import Question
from mllm_jax.data.features import picture_sizes
from mllm_jax.data.sequences import LazySequence
from mllm_jax.processors.processor import Processor
from mllm_jax.processors.rows import same_at_start

T = TypeVar("T")


def interleave(lists: Sequence[Sequence[T]]) -> list[T]:
    """Merge lists into one, with the items of each spread evenly over it."""
    placed = [
        ((i + 0.5) / len(items), number, item)
        for number, items in enumerate(lists)
        for i, item in enumerate(items)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


@dataclasses.dataclass(frozen=True)
class PackedQuestions:
    """Training batches in which a row has several questions about one picture, read once.

    If a picture attends to the question after it (PaliGemma), each question has its own row.

    Attributes:
      processor: Makes the batches.
      examples: The examples, with questions.
      features: float[N, P, E], the vision features of the examples.
      size: The number of pictures in a batch.
      steps: The number of batches.
      questions: The number of questions of each picture, drawn again each epoch.
      seed: The seed of the order; None goes through the examples in order, first questions first.
      styles: The styles of the questions; all by default.
      shift: The number of positions by which the pictures of a batch are shifted, so that questions
        are asked about wrong pictures.
    """

    processor: Processor
    examples: Sequence[Example]
    features: np.ndarray
    size: int
    steps: int
    questions: int
    seed: int | None
    styles: tuple[str, ...] = ()
    shift: int = 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a training step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        at = np.arange(step * self.size, (step + 1) * self.size)
        epochs, places = np.divmod(at, len(self.examples))
        rows = [self._order(epoch)[i] for epoch, i in zip(epochs, places, strict=True)]
        turns = [self._turns(row, step) for row in rows]
        shown = np.roll(rows, self.shift).tolist()
        if self._shares_pictures:
            return self.processor.pack(None, turns, **self._pictures(shown), length=self._length)
        pairs = [pair for row in turns for pair in row]
        prompts, answers = ([pair[i] for pair in pairs] for i in range(2))
        shown = [row for row, pairs in zip(shown, turns, strict=True) for _ in pairs]
        return self.processor(
            None, prompts, answers=answers, **self._pictures(shown), length=self._length,
            rows=self.size * self.questions,
        )  # fmt: skip

    def _pictures(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return the processor's arguments for the pictures of rows."""
        return {
            "features": np.stack([self.features[row] for row in rows]),
            "sizes": picture_sizes(self.processor.config, [self.examples[row] for row in rows]),
        }

    @property
    def _shares_pictures(self) -> bool:
        """Whether questions can share a picture."""
        return self.processor.config.attends_forward != "prompt"

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.examples))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))

    def _turns(self, row: int, step: int) -> list[tuple[str, str]]:
        questions = self._questions_of(self.examples[row])
        drawn = np.arange(len(questions))
        if self.seed is not None:
            drawn = np.random.default_rng([self.seed, row, step]).permutation(drawn)
        return [(questions[i].prompt, questions[i].answer) for i in drawn[: self.questions]]

    def _questions_of(self, example: Example) -> list[Question]:
        return [q for q in example.questions if not self.styles or q.style in self.styles]

    @functools.cached_property
    def _length(self) -> int:
        """One length for all batches, so that training compiles once."""
        if not self._shares_pictures:
            pairs = [(e, q) for e in self.examples for q in self._questions_of(e)]
            return row_length(self.processor, pairs, answers=True)
        return packed_length(
            self.processor, map(self._questions_of, self.examples), self.questions, self.examples
        )


def packed_length(
    processor: Processor,
    questions_of: Iterable[Sequence[Question]],
    questions: int,
    examples: Sequence[Example | None] = (),
) -> int:
    """Return the number of tokens of the longest packed row, rounded up to a multiple of 8.

    Args:
      processor: Makes the batches.
      questions_of: The questions of each example.
      questions: The number of questions that share a row.
      examples: The examples, for models that read a picture by its size.
    """
    placeholder = _placeholder_pictures(processor, 1, examples)
    rows = [[(q.prompt, q.answer) for q in asked] for asked in questions_of]
    lengths: dict[tuple[str, str], int] = {}
    starts: list[list[int]] = []  # the ids before each question
    for pair in dict.fromkeys(itertools.chain.from_iterable(rows)):
        batch = processor.pack(None, [[pair]], **placeholder)
        assert batch.segment is not None
        lengths[pair] = int(batch.valid.sum())
        before = np.asarray(batch.valid & (batch.segment == 0))
        starts.append(np.asarray(batch.ids)[before].tolist())
    shared = same_at_start(starts)
    own = (sorted(lengths[pair] - shared for pair in row)[-questions:] for row in rows)
    return -(-(shared + max(map(sum, own), default=0)) // 8) * 8


def ask(examples: Sequence[Example], styles: Sequence[str]) -> list[tuple[Example, Question]]:
    """Return one (example, question) pair for each example, with the styles in turn."""
    return list(ExampleQuestions(examples, tuple(styles)))


@dataclasses.dataclass(frozen=True)
class ExampleQuestions(LazySequence[tuple[Example, Question]]):
    """The pairs of `ask`, each made when it is needed, so that pictures are not kept in memory.

    Attributes:
      examples: The examples, with questions.
      styles: The styles of the questions.
      count: The largest number of pairs.
    """

    examples: Sequence[Example]
    styles: tuple[str, ...]
    count: int | None = None  # type: ignore[assignment]  # Sequence has a method of this name

    def __len__(self) -> int:
        return len(self.examples) if self.count is None else min(self.count, len(self.examples))

    def item(self, index: int) -> tuple[Example, Question]:
        """Return the item at an index; see `LazySequence`."""
        example = self.examples[index]
        has = [s for s in self.styles if any(q.style == s for q in example.questions)]
        if not has:
            raise ValueError(
                f"{example.domain}/{example.id} has no question of style {' or '.join(self.styles)}"
            )
        style = has[index % len(has)]
        questions = [q for q in example.questions if q.style == style]
        return example, questions[index // len(has) % len(questions)]


@dataclasses.dataclass(frozen=True)
class QuestionBatches:
    """Batches of one question per row, all of one shape; empty rows pad the last.

    Attributes:
      processor: Makes the batches.
      pairs: (example, question) pairs, see `ask`.
      size: The number of questions in a batch.
      length: The number of tokens of a row.
      features: float[N, P, E], the vision features of the examples of the pairs, used in place of
        their pictures.
      filled: The number of rows to which empty rows pad every batch, such as a multiple of a mesh
        axis; `size` by default.
    """

    processor: Processor
    pairs: Sequence[tuple[Example, Question]]
    size: int
    length: int | None = None
    features: np.ndarray | None = None
    filled: int | None = None

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        """Return the batch of this number."""
        pairs = self.rows(number)
        prompts = [question.prompt for _, question in pairs]
        rows = self.filled or self.size
        if self.features is None:
            images = [example.image for example, _ in pairs]
            return self.processor(images, prompts, rows=rows, length=self.length)
        features = np.asarray(self.features[number * self.size :][: len(pairs)])
        sizes = picture_sizes(self.processor.config, [example for example, _ in pairs])
        return self.processor(
            None, prompts, features=features, sizes=sizes, rows=rows, length=self.length
        )

    def rows(self, number: int) -> Sequence[tuple[Example, Question]]:
        """Return the pairs of a batch."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        return self.pairs[number * self.size : (number + 1) * self.size]

    def candidates(self, number: int) -> list[tuple[str, ...]]:
        """Return the options of each row of a batch."""
        return [question.options for _, question in self.rows(number)]

    def right(self, number: int) -> np.ndarray:
        """Return int[rows], the index of each row's right option."""
        return np.array([q.options.index(q.answer) for _, q in self.rows(number)])


def row_length(
    processor: Processor, pairs: Sequence[tuple[Any, Question]], *, answers: bool = False
) -> int:
    """Return the number of tokens of the longest row, rounded up to a multiple of 8.

    Args:
      processor: Makes the batches.
      pairs: (example, question) pairs.
      answers: Whether a row holds the answer as well as the prompt.
    """
    texts = sorted({(q.prompt, q.answer) if answers else (q.prompt, "") for _, q in pairs})
    prompts = [prompt for prompt, _ in texts]
    said = [answer for _, answer in texts] if answers else None
    placeholders = _placeholder_pictures(processor, len(prompts), [e for e, _ in pairs])
    longest = processor(None, prompts, answers=said, **placeholders).valid.sum(-1).max()
    return int(-(-longest // 8) * 8)


def _placeholder_pictures(
    processor: Processor, pictures: int, examples: Sequence[Example | None]
) -> dict[str, Any]:
    """Return features and sizes for pictures with the largest number of tokens.

    Args:
      processor: Makes the batches.
      pictures: The number of pictures.
      examples: Pictures of which one has the most tokens, if the number depends on their size.
    """
    config, size = processor.config, processor.config.largest
    known = [example for example in examples if example is not None]
    if config.depends_on_size and known:
        sizes = set(picture_sizes(config, known) or ())
        size = max(sizes, key=lambda size: len(processor.layout(size).patches))
    features = np.zeros((pictures, processor.feature_places([size]), 1), np.float32)
    return {"features": features, "sizes": [size] * pictures}
