"""The base of the five builders: rows of questions, sizes, and the orders of the released code."""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from mllm_jax.data import manual


@dataclasses.dataclass(frozen=True)
class Row:
    """One question about one picture, which is not read yet.

    Attributes:
      id: The question's id.
      picture: The picture's name; one row of each picture is taken.
      files: The picture's file, or its frames from left to right.
      question: The question.
      answer: One right answer, or the letter of the right choice.
      answers: See `questions.VqaQuestion`.
      confidence: See `questions.VqaQuestion`.
      choices: See `questions.VqaQuestion`.
      type: See `questions.VqaQuestion`.
    """

    id: str
    picture: str
    files: tuple[pathlib.Path, ...]
    question: str
    answer: str
    answers: tuple[str, ...]
    confidence: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    type: str = ""


@dataclasses.dataclass
class Size(tfds.core.BuilderConfig):
    """The number of examples of each split; None for all.

    Attributes:
      train: The number of examples of the training split.
      val: The number of examples of the validation split.
    """

    train: int | None = None
    val: int | None = None


class VqaBuilder(manual.ManualBuilder, skip_registration=True):
    """Pictures with questions.

    A subclass defines the files it needs and the order of its rows.
    """

    BUILDER_CONFIGS: ClassVar = [
        Size(name="paper", description="the paper's", train=10_001, val=1_001),
        Size(name="full", description="one question of every picture"),
    ]
    ONE_A_PICTURE = True

    def rows(self, folder: pathlib.Path, split: str) -> Iterable[Row]:
        """Yield the rows of a split in the order of the released code."""
        raise NotImplementedError

    def pictures(
        self, folder: pathlib.Path, split: str, rows: Sequence[Row]
    ) -> Iterator[list[bytes]]:
        """Yield the encoded picture of each row, or its frames."""
        for row in rows:
            yield [manual.encoded(self.name, file) for file in row.files]

    def record(self) -> dict[str, Any]:
        """Return the TFDS features of a record."""
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        return {
            "id": text, "question": text, "answer": text, "type": text, "source": text,
            "answers": texts, "confidence": texts, "choices": texts,
            "pictures": texts,  # encoded files: one, or frames from left to right
        }  # fmt: skip

    def examples(self, folder: pathlib.Path, split: str) -> Iterator[dict]:
        """Yield the records of a split, in order."""
        rows = list(self._select(self.rows(folder, split), getattr(self.builder_config, split)))
        for row, pictures in zip(rows, self.pictures(folder, split, rows), strict=True):
            yield {
                "id": row.id, "question": row.question, "answer": row.answer, "type": row.type,
                "source": row.picture, "answers": row.answers, "confidence": row.confidence,
                "choices": row.choices, "pictures": pictures,
            }  # fmt: skip

    def _select(self, rows: Iterable[Row], limit: int | None) -> Iterator[Row]:
        """Yield the first row of each picture, up to the limit."""
        seen: set[str | int] = set()
        for row in rows:
            if limit is not None and len(seen) >= limit:
                return
            key = row.picture if self.ONE_A_PICTURE else len(seen)
            if key not in seen:
                seen.add(key)
                yield row


def shuffled(items: Sequence, seed: int) -> list:
    """Return the items in the order of `random.Random(seed).shuffle`."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


def pandas_order(count: int, seed: int) -> np.ndarray:
    """Return the order of rows of pandas' `DataFrame.sample(frac=1, random_state=seed)`."""
    return np.random.RandomState(seed).choice(count, count, replace=False)


def datasets_order(count: int, seed: int) -> np.ndarray:
    """Return the order of rows of Hugging Face's `Dataset.shuffle(seed=seed)`."""
    return np.random.default_rng(seed).permutation(count)


def parquet() -> Any:
    """Return pyarrow's module for parquet files, which two of the data sets need."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("this data set comes as parquet: pip install pyarrow") from error
    return pyarrow.parquet
