"""Training batches: one question per row with precomputed vision features, or collected vectors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from mllm_jax.arguments import require_whole
from mllm_jax.batch import Batch
from mllm_jax.data.embedded.questions import Question
from mllm_jax.passes.collect import VectorSource
from mllm_jax.processors.processor import Processor
from mllm_jax.typing import Float, Int


@dataclasses.dataclass(frozen=True)
class AnswerBatches:
    """A deterministic sequence of batches; each epoch has its own order.

    Attributes:
      processor: The processor of the model.
      ask: (example, epoch) -> its question, which may differ from epoch to epoch.
      features: float[N, P, E], vision features of the examples.
      size: Number of rows of a batch.
      count: Number of batches.
      length: Number of tokens of a row.
      seed: Seed of the order.
      end: Whether the end of turn after an answer is learned.
      sizes: The (height, width) of the pictures, if their layout depends on it.
    """

    processor: Processor
    ask: Callable[[int, int], Question]
    features: np.ndarray
    size: int
    count: int
    length: int
    seed: int = 0
    end: bool = True
    sizes: Sequence[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < self.count:
            raise IndexError(f"batch {number} of {self.count}")
        rows = range(number * self.size, (number + 1) * self.size)
        drawn = [self._draw(row) for row in rows]
        questions = [self.ask(example, epoch) for example, epoch in drawn]
        batch = self.processor(
            None,
            [question.prompt for question in questions],
            answers=[question.answer for question in questions],
            features=np.stack([self.features[example] for example, _ in drawn]),
            sizes=None if self.sizes is None else [self.sizes[example] for example, _ in drawn],
            length=self.length,
        )
        if self.end:
            return batch
        assert batch.labels is not None  # the batch was made with answers
        return batch.replace(labels=without_end(np.asarray(batch.labels)))

    def _draw(self, row: int) -> tuple[int, int]:
        """Return the example of a row, counted through all epochs, and the epoch."""
        epoch, place = divmod(row, len(self.features))
        return int(_order(len(self.features), self.seed, epoch)[place]), epoch


@dataclasses.dataclass(frozen=True)
class VectorBatches:
    """A deterministic sequence of batches of collected vectors; each epoch has its own order.

    Attributes:
      source: The vectors. Those with several axes, such as heads, are flattened.
      size: Number of vectors of a batch.
      count: Number of batches.
      seed: Seed of the order.
    """

    source: VectorSource
    size: int
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
          ValueError: There is no vector, or a number is not an integer or too small.
        """
        require_whole("size", self.size)
        require_whole("count", self.count)
        if not len(self.source):
            raise ValueError(f"{self.source} has no vector to train on: no token was selected")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Float[np.ndarray, "n D"]:
        """Return the batch of this number, in float32."""
        if not 0 <= number < self.count:
            raise IndexError(f"batch {number} of {self.count}")
        rows = np.arange(number * self.size, (number + 1) * self.size)
        count = len(self.source)
        epochs, places = np.divmod(rows, count)
        drawn = np.concatenate([
            _order(count, self.seed, epoch)[places[epochs == epoch]]
            for epoch in np.unique(epochs).tolist()
        ])  # fmt: skip
        return self.source[drawn].value.astype(np.float32).reshape(self.size, -1)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " N"]:
    """Return the order of an epoch, which its batches share."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.setflags(write=False)
    return order


def without_end(labels: np.ndarray) -> np.ndarray:
    """Remove the last label of each row, the end of turn, from labels int32[B, A]."""
    real = labels >= 0
    last = real.sum(-1, keepdims=True) - 1
    return np.where(np.arange(labels.shape[-1]) == last, -1, labels)
