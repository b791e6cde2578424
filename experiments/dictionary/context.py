"""The context of the dictionary study: what every step reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from experiments import context
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.addresses import Address
from mllm_jax.batch import Batch
from mllm_jax.data import batching
from mllm_jax.data.domains import Example
from mllm_jax.data.embedded.questions import Question
from mllm_jax.passes.collect import VectorSource
from mllm_jax.typing import Float

KINDS = {"image": tok.image, "text": tok.system | tok.question}  # of the prompt
CHUNK = 1024  # vectors that are encoded at one time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(context.Context):
    """The inputs of every step of the study.

    Attributes:
      pairs: The pictures and their questions, by split.
      length: The tokens of a row.
    """

    pairs: dict[str, list[tuple[Example, Question]]]
    length: int

    @property
    def target(self) -> Address:
        """The site and the layer of the dictionary."""
        return S.get(self.config.site)[self.config.layer]

    def questions(self, split: str) -> batching.QuestionBatches:
        """Return the questions of a split in batches."""
        return batching.QuestionBatches(
            self.processor, self.pairs[split], self.config.batch_size, self.length
        )

    @functools.cached_property
    def test_batches(self) -> list[Batch]:
        """The held-out questions, with the features of their pictures."""
        questions = self.questions("test")
        return [self.with_features(questions[i]) for i in range(len(questions))]


def chunks(source: VectorSource) -> Iterator[Float[np.ndarray, "n D"]]:
    """Yield all vectors in the order of the data, in chunks; vectors of heads are joined."""
    for start in range(0, len(source), CHUNK):
        values = source[start : start + CHUNK].value.astype(np.float32)
        yield values.reshape(len(values), -1)
