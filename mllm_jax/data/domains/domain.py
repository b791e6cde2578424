"""A domain: a named sequence of examples, embedded or from a user's files."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

from mllm_jax import notebook
from mllm_jax.data.domains import conversations, folder, records, table
from mllm_jax.data.domains.examples import Example, FileExamples, Row


def require_known(what: str, name: str, names: Sequence[str]) -> str:
    """Return a name if it is one of the known names.

    Args:
      what: The kind of name, for the error, such as "split".
      name: The name.
      names: The known names.

    Raises:
      ValueError: The name is unknown; the message lists the known ones.
    """
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(names)}")
    return name


class Domain(Sequence[Example]):
    """A named, ordered set of examples.

    The embedded domains are ordered so that labels alternate: any prefix is balanced.

    Args:
      name: The domain's name, such as "medical".
      split: "test", "train" or the user's own name.
      examples: A sequence of examples; it is indexed only when an example is needed.

    Raises:
      ValueError: There are no examples.
    """

    def __init__(self, name: str, split: str, examples: Sequence[Example]):
        if not len(examples):
            raise ValueError(f"domain {name!r} ({split}) is empty: it needs one or more examples")
        self.name = name
        self.split = split
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Domain: ...

    def __getitem__(self, index: int | slice) -> Example | Domain:
        """Return one example, or the domain of the examples in a slice."""
        if isinstance(index, slice):
            selected = [self._examples[i] for i in range(len(self))[index]]
            return Domain(self.name, self.split, selected)
        return self._examples[range(len(self))[index]]

    def __iter__(self) -> Iterator[Example]:
        return (self._examples[index] for index in range(len(self)))

    def _repr_html_(self) -> str:
        return notebook.domain(self)

    def __repr__(self) -> str:
        return f"Domain({self.name!r}, {self.split!r}, {len(self)} examples)"

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of all images and questions in their order, for manifests.

        The data sets of MMNeuron are too large to be read for this: their examples provide a
        fingerprint.
        """
        if known := getattr(self._examples, "fingerprint", None):
            return known
        digest = hashlib.sha256()
        for example in self:
            digest.update(records.pack(example))
        return digest.hexdigest()

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike,
        question: str | None = None,
        name: str | None = None,
        split: str = "test",
    ) -> Domain:
        """Return the domain of `path/<label>/<image>`; the folder's name is the label.

        Args:
          path: The folder.
          question: The question that replaces the built-in wordings of the category question.
          name: The domain's name; the folder's by default.
          split: The split's name.

        Returns:
          The domain, ordered by path; images are read when they are needed.
        """
        name = name or pathlib.Path(path).resolve().name
        return cls(name, split, FileExamples(name, folder.read(pathlib.Path(path), name, question)))

    @classmethod
    def from_csv(
        cls, path: str | os.PathLike, name: str | None = None, split: str = "test"
    ) -> Domain:
        """Return the domain of a table with the columns image, question and answer.

        Commas, semicolons or tabs separate the cells, as in the header. `image` is a path relative
        to the table's folder. Rows with the same image are questions about one example. Optional
        columns are options (separated by `|`), style, label, id and licence.
        """
        return cls._from_table(path, name, split, table.from_csv)

    @classmethod
    def from_jsonl(
        cls, path: str | os.PathLike, name: str | None = None, split: str = "test"
    ) -> Domain:
        """Return the domain of a file with one JSON object per line, with the fields of `from_csv`.

        `options` is a list here. Objects may have LLaVA's `conversations`, see `from_json`.
        """
        return cls._from_table(path, name, split, table.from_jsonl)

    @classmethod
    def from_json(
        cls, path: str | os.PathLike, name: str | None = None, split: str = "test"
    ) -> Domain:
        """Return the domain of a JSON list of objects, such as LLaVA's training data.

        An object has an `image`, relative to the file's folder, and either `conversations`, of
        which the first question and its answer are read, or the fields of `from_jsonl`.
        """
        return cls._from_table(path, name, split, table.from_json)

    @classmethod
    def _from_table(
        cls, path: str | os.PathLike, name: str | None, split: str, read: table.Reader
    ) -> Domain:
        name = name or pathlib.Path(path).stem
        return cls(name, split, FileExamples(name, read_table(pathlib.Path(path), name, read)))


def read_table(path: pathlib.Path, name: str, read: table.Reader) -> Sequence[Row]:
    """Return the examples of a table, one for each image.

    Args:
      path: The table.
      name: The domain's name.
      read: The function that reads the table's records, such as `table.from_csv`.
    """
    return table.grouped(name, path, conversations.flattened(path, read(path)))


def require_domains(domains: Mapping[str, Domain], at_least: int = 2) -> None:
    """Raise an error if there are too few domains for a study that compares them.

    Args:
      domains: The domains by name.
      at_least: The number of domains that the study needs.

    Raises:
      ValueError: There are fewer domains.
    """
    if len(domains) < at_least:
        raise ValueError(
            f"this study compares domains and needs {at_least} or more, but there are "
            f"{len(domains)}: {sorted(domains) or 'none'}"
        )
