"""What the five TFDS builders share: one record format, sizes, and the list of missing files."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds


@dataclasses.dataclass(frozen=True)
class Row:
    """One question about one picture, which is not read yet.

    Attributes:
        id: of the question. picture: the picture's name; one row is taken of each.
        files: the picture, or its frames from left to right.
        answer: one right answer, or the letter of the right choice.
        answers, confidence, choices, type: see `questions.VqaQuestion`.
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


@dataclasses.dataclass(frozen=True)
class Need:
    """A file or a folder that has to be there.

    Attributes:
        path: within the data set's folder; may hold a `*`.
        source: where it comes from.
    """

    path: str
    source: str


@dataclasses.dataclass
class Size(tfds.core.BuilderConfig):
    """How many examples of each split; all where it is None."""

    train: int | None = None
    val: int | None = None


class VqaBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set in files that were downloaded by hand.

    A subclass says what it needs and in which order its rows come.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        Size(name="paper", description="the paper's", train=10_001, val=1_001),
        Size(name="full", description="one question of every picture"),
    ]
    NEEDS: ClassVar[tuple[Need, ...]] = ()
    HOMEPAGE = ""
    LICENCE = ""
    ONE_A_PICTURE = True

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        head = f"Download from {cls.HOMEPAGE} into FOLDER/{cls.name}, where FOLDER is `manual`:"
        cls.MANUAL_DOWNLOAD_INSTRUCTIONS = _listed(head, cls.NEEDS)

    @classmethod
    def require(cls, folder: pathlib.Path) -> None:
        """Lists what is missing in the data set's folder, if anything is.

        Raises:
            FileNotFoundError: with the list.
        """
        missing = [need for need in cls.NEEDS if not any(folder.glob(need.path))]
        if missing:
            head = f"{cls.name}: missing in {folder}, to be downloaded from {cls.HOMEPAGE}:"
            raise FileNotFoundError(_listed(head, missing))

    def rows(self, folder: pathlib.Path, split: str) -> Iterable[Row]:
        """The rows of a split in the order of the released code."""
        raise NotImplementedError

    def pictures(
        self, folder: pathlib.Path, split: str, rows: Sequence[Row]
    ) -> Iterator[list[bytes]]:
        """The encoded picture of each row, or its frames."""
        for row in rows:
            yield [_encoded(self.name, file) for file in row.files]

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            description=(self.__doc__ or "").partition("\n")[0],
            homepage=self.HOMEPAGE,
            license=self.LICENCE,
            disable_shuffling=True,  # the order is the released code's
            features=tfds.features.FeaturesDict(
                {
                    "id": text, "question": text, "answer": text, "type": text, "source": text,
                    "answers": texts, "confidence": texts, "choices": texts,
                    "pictures": texts,  # encoded files: one, or frames from left to right
                }
            ),
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir) / self.name
        self.require(folder)
        return {split: self._generate_examples(folder, split) for split in ("train", "val")}

    def _generate_examples(self, folder: pathlib.Path, split: str) -> Iterator[tuple[int, dict]]:
        rows = list(self._chosen(self.rows(folder, split), getattr(self.builder_config, split)))
        pairs = zip(rows, self.pictures(folder, split, rows), strict=True)
        for number, (row, pictures) in enumerate(pairs):
            yield number, {
                "id": row.id, "question": row.question, "answer": row.answer, "type": row.type,
                "source": row.picture, "answers": row.answers, "confidence": row.confidence,
                "choices": row.choices, "pictures": pictures,
            }  # fmt: skip

    def _chosen(self, rows: Iterable[Row], limit: int | None) -> Iterator[Row]:
        """The first row of each picture, up to the limit."""
        seen = set()
        for row in rows:
            if limit is not None and len(seen) >= limit:
                return
            key = row.picture if self.ONE_A_PICTURE else len(seen)
            if key not in seen:
                seen.add(key)
                yield row


def shuffled(items: Sequence, seed: int) -> list:
    """In the order of `random.Random(seed).shuffle`."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


def pandas_order(count: int, seed: int) -> np.ndarray:
    """The order of rows of pandas' `DataFrame.sample(frac=1, random_state=seed)`."""
    return np.random.RandomState(seed).choice(count, count, replace=False)


def datasets_order(count: int, seed: int) -> np.ndarray:
    """The order of rows of Hugging Face's `Dataset.shuffle(seed=seed)`."""
    return np.random.default_rng(seed).permutation(count)


def read_json(path: pathlib.Path) -> Any:
    """A JSON file of a data set; an error names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from error


def parquet():
    """pyarrow's reader, which two of the data sets need."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("this data set comes as parquet: pip install pyarrow") from error
    return pyarrow.parquet


def _listed(head: str, needs: Sequence[Need]) -> str:
    longest = max((len(need.path) for need in needs), default=0)
    return "\n".join([head, *(f"  {need.path:{longest}}  {need.source}" for need in needs)])


def _encoded(name: str, file: pathlib.Path) -> bytes:
    try:
        if file.suffix.lower() not in (".tif", ".tiff"):
            return file.read_bytes()
        out = io.BytesIO()
        PIL.Image.open(file).convert("RGB").save(out, "PNG")  # what every reader opens
        return out.getvalue()
    except OSError as error:
        raise FileNotFoundError(
            f"{name}: the picture {file} cannot be read ({error.strerror or error}); unpack the "
            "archive of pictures again"
        ) from error
