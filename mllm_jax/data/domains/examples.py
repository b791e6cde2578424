"""Examples, which are images with their questions, and sequences of examples in image files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import PIL.Image

from mllm_jax import files, notebook
from mllm_jax.data.embedded.questions import Question
from mllm_jax.data.sequences import LazySequence
from mllm_jax.processors import pictures


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its questions.

    Attributes:
      id: A name that is unique in its domain.
      domain: Its domain's name.
      label: The class that it shows.
      encoded: The image file's bytes.
      questions: The questions about it, with answers and options.
      source: Where the image comes from.
      licence: The image's licence; empty when unknown.
    """

    id: str
    domain: str
    label: str
    encoded: bytes = dataclasses.field(repr=False)
    questions: tuple[Question, ...]
    source: str = ""
    licence: str = ""

    @property
    def image(self) -> PIL.Image.Image:
        """The picture as a viewer shows it, in RGB; see `pictures.read`."""
        try:
            return pictures.read(self.encoded)
        except ValueError as error:
            raise ValueError(
                f"{_named(self.domain, self.id)}: the image {files.name(self.source, 100)} cannot "
                f"be read ({files.reason(error.__cause__)}); replace or remove it"
            ) from error

    def _repr_html_(self) -> str:
        return notebook.example(self)

    def ask(self, style: str) -> Question:
        """Return the first question of a style.

        Raises:
          ValueError: There is no such question.
        """
        for question in self.questions:
            if question.style == style:
                return question
        styles = sorted({question.style for question in self.questions})
        raise ValueError(
            f"domain {self.domain!r}, example {self.id!r} has no question of style {style!r}; "
            f"it has {styles}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """An example whose image is still in its file.

    Attributes:
      id: As in `Example`.
      label: As in `Example`.
      file: The image file.
      questions: A function that returns the questions.
      licence: As in `Example`.
    """

    id: str
    label: str
    file: str
    questions: Callable[[], tuple[Question, ...]]
    licence: str = ""


class FileExamples(LazySequence[Example]):
    """Examples whose images are files of the user, read when they are needed.

    Args:
      domain: The domain's name.
      rows: The examples.
    """

    def __init__(self, domain: str, rows: Sequence[Row]):
        self._domain = domain
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Example:
        """Return the item at an index; see `LazySequence`."""
        row = self._rows[index]
        try:
            encoded = files.read_bytes(row.file, pictures.MAX_BYTES)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{_named(self._domain, row.id)}: the image {files.name(row.file, 100)} cannot be "
                f"read ({files.reason(error)})"
            ) from error
        return Example(
            row.id, self._domain, row.label, encoded, row.questions(), row.file, row.licence
        )


def _named(domain: str, example: str) -> str:
    return f"domain {files.name(domain, 40)!r}, example {files.name(example, 60)!r}"
