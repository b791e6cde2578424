"""Training batches of one question a row, on vision features that were computed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.data.embedded.questions import Question
from mllm_jax.processors.processor import Processor


@dataclasses.dataclass(frozen=True)
class AnswerBatches:
    """A sequence of batches, always the same at the same place; each epoch has its own order.

    Attributes:
      ask: (example, epoch) -> its question, which may differ from epoch to epoch.
      features: float[N, P, E], of the examples.
      size: rows of a batch. count: batches. length: tokens of a row.
      seed: of the order.
      end: whether the end of turn after an answer is learned.
    """

    processor: Processor
    ask: Callable[[int, int], Question]
    features: np.ndarray
    size: int
    count: int
    length: int
    seed: int = 0
    end: bool = True

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < self.count:
            raise IndexError(f"batch {number} of {self.count}")
        drawn = [self._drawn(at) for at in range(number * self.size, (number + 1) * self.size)]
        asked = [self.ask(*one) for one in drawn]
        batch = self.processor(
            None,
            [q.prompt for q in asked],
            answers=[q.answer for q in asked],
            features=np.stack([self.features[row] for row, _ in drawn]),
            length=self.length,
        )
        return batch if self.end else batch.replace(labels=without_end(batch.labels))

    def _drawn(self, at: int) -> tuple[int, int]:
        """The example at this place of all epochs, and the epoch."""
        epoch, place = divmod(at, len(self.features))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.features))
        return int(order[place]), epoch


def without_end(labels: np.ndarray) -> np.ndarray:
    """Labels int32[B, A] without the last of each row, the end of turn."""
    real = labels >= 0
    last = real.sum(-1, keepdims=True) - 1
    return np.where(np.arange(labels.shape[-1]) == last, -1, labels)
