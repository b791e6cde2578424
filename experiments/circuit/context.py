"""The inputs of every step of the circuit study, and the contrasts of its pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import context
from experiments.circuit import pairs
from experiments.circuit.pairs import Pair
from experiments.examples import Side
from mllm_jax.analysis.contrasts import Contrast
from mllm_jax.batch import Batch
from mllm_jax.passes.run import Out
from mllm_jax.typing import Array, Bool, Float, Int

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(context.Context):
    """The inputs of every step of the study.

    Attributes:
      pairs: The pairs of each split that the study keeps.
      length: The tokens of a prompt, with padding.
      shared: The padded number of tokens of the common beginning of the answers of a pair.
    """

    pairs: dict[str, list[Pair]]
    length: int
    shared: int

    def rows(self, split: str, number: int) -> Int[np.ndarray, " B"]:
        """Return the pairs of a batch, padded with the last pair."""
        size, count = self.config.batch_size, len(self.pairs[split])
        return np.minimum(np.arange(number * size, (number + 1) * size), count - 1)

    def real(self, split: str, number: int) -> Bool[np.ndarray, " B"]:
        """Return False for the rows that pad a batch."""
        size = self.config.batch_size
        return np.arange(number * size, (number + 1) * size) < len(self.pairs[split])

    def batches(self, split: str, least: int | None = None) -> range:
        """Return the numbers of the batches of a split, or of those of its first pairs."""
        count = len(self.pairs[split])
        return range(-(-min(count, count if least is None else least) // self.config.batch_size))

    def contrast(self, split: str, number: int) -> Contrast:
        """Return the contrast of a batch of pairs."""
        chosen = [self.pairs[split][row] for row in self.rows(split, number)]
        right, wrong = (
            np.array([getattr(pair.answers, name) for pair in chosen])
            for name in ("right", "wrong")
        )
        metric = jax.tree_util.Partial(difference, right=right, wrong=wrong)
        clean, corrupt = (
            self._batch([pair[side] for pair in chosen], [pair.answers.shared for pair in chosen])
            for side in range(2)
        )
        return Contrast.of(metric, self.model, clean, corrupt, self.edits)

    def _batch(self, sides: Sequence[Side], shared: Sequence[Sequence[int]]) -> Batch:
        images = [example.image for example, _ in sides]
        prompts = [question.prompt for _, question in sides]
        batch = self.with_features(self.processor(images, prompts, length=self.length))
        batch = self.model.unshared(batch.replace(processor=None))
        return pairs.after_shared(batch, shared, self.shared)

    def each(self, name: str, split: str, make: Callable[[int], Arrays], count: int | None = None):
        """Return the arrays of a step of each batch; a killed run continues at the next batch.

        Args:
          name: The name of the steps.
          split: The split.
          make: number of a batch -> its arrays.
          count: The number of pairs; all by default.
        """
        bar = tqdm.tqdm(self.batches(split, count), desc=f"{name}, {split}", leave=False)
        return [
            self.workdir.arrays(f"{name}/{split}-{number}", functools.partial(make, number))
            for number in bar
        ]


def difference(out: Out, right: Int[Array, " B"], wrong: Int[Array, " B"]) -> Float[Array, " B"]:
    """Return the difference of the log-probabilities of two tokens, which is that of the logits."""
    assert out.logits is not None
    rows = jnp.arange(len(right))
    return out.logits[rows, right] - out.logits[rows, wrong]
