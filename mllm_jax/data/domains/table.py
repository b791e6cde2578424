"""Tables of a user: CSV, JSON lines and JSON, read into records and grouped by image.

A record is a dict with the fields image, question and answer, and optionally options, style, label,
id and licence. Each is paired with its position in the file, for errors: "birds.csv, line 3".
"""

from __future__ import annotations

import codecs
import collections
import csv
import dataclasses
import functools
import io
import json
import logging
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

from mllm_jax import files
from mllm_jax.data.domains.examples import Row
from mllm_jax.data.embedded import questions as questions_lib

Record = tuple[str, dict[str, Any]]  # its place in the file, and its fields
Reader = Callable[[pathlib.Path], Iterable[Record]]

NEEDED = ("image", "question", "answer")
TEXTS = {*NEEDED, "style", "label", "id", "licence"}
DELIMITERS = (",", ";", "\t")
MAX_BYTES = 2**31  # of one table
MOST_CLASSES = 1000
BYTE_ORDER_MARKS = (  # UTF-32 begins like UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Entry(NamedTuple):
    """A record whose fields have been checked; those it does not have are None."""

    image: str
    question: str
    answer: str
    style: str
    options: tuple[str, ...]
    label: str | None
    id: str | None
    licence: str | None

    @property
    def key(self) -> str:
        """The id of the example: its own, or the name of its image."""
        return self.image if self.id is None else self.id


def from_csv(path: pathlib.Path) -> Iterator[Record]:
    """Yield the records of a table that has the delimiter of its header (comma, semicolon, tab)."""
    text = _text(path)
    header_line = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=_delimiter(header_line),
        skipinitialspace=True,
        strict=True,
    )
    rows = _numbered(reader, path)
    number, header = next(rows, (1, []))
    _require(header, f"table {files.name(path)}", "columns")
    twice = sorted(name for name, count in collections.Counter(header).items() if count > 1)
    if any(twice):
        raise ValueError(
            files.line(f"{files.name(path)}, line {number}: two columns are named {twice[-1]!r}")
        )
    named = files.name(path)
    for number, cells in rows:
        where = f"{named}, line {number}"
        if len(cells) != len(header):
            raise ValueError(
                f"{where}: {len(cells)} cells under {len(header)} columns; put a cell that "
                "contains the delimiter in double quotes"
            )
        yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _numbered(reader, path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the stripped cells of rows that are not blank, with the number of the first line."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{files.name(path)}, line {number}: not a row of a table ({files.reason(error)}); "
                "is a double quote left open?"
            ) from error
        cells = list(map(str.strip, cells))
        if any(cells):
            yield number, cells


def _delimiter(header: str) -> str:
    """Return the delimiter with which the header has most of the needed columns."""

    def columns(delimiter: str) -> int:
        return len({cell.strip(' "\r\n') for cell in header.split(delimiter)} & {*NEEDED})

    return max(DELIMITERS, key=columns)


def from_jsonl(path: pathlib.Path) -> Iterator[Record]:
    """Yield the records of a file with one JSON object per line."""
    named = files.name(path)
    for number, line in enumerate(io.StringIO(_text(path)), 1):
        if line.strip():
            where = f"{named}, line {number}"
            yield where, _object(_json(line, where), where)


def from_json(path: pathlib.Path) -> Iterator[Record]:
    """Yield the records of a file that is one JSON list of objects."""
    named = files.name(path)
    objects = _json(_text(path), named)
    if not isinstance(objects, list):
        raise ValueError(
            f"{named}: a JSON {type(objects).__name__}, not a list of objects; for one object per "
            "line, name the file .jsonl"
        )
    for number, value in enumerate(objects):
        where = f"{named}, record {number}"
        yield where, _object(value, where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({files.reason(error)})") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON object without its nulls."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return {name: field for name, field in value.items() if field is not None}


def _text(path: pathlib.Path) -> str:
    """Return a file as text, in the encoding of its byte order mark, or UTF-8."""
    try:
        content = files.read_bytes(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"domain file {files.name(path)} cannot be read: {files.reason(error)}"
        ) from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{files.name(path)}, line {line}: not {encoding.upper()} ({error.reason}); save it as "
            "UTF-8 (iconv -f latin1 -t utf-8)"
        ) from error
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"{files.name(path)}, line {line}: a NUL character; save it as UTF-8 text")
    return text


def grouped(name: str, path: pathlib.Path, records: Iterable[Record]) -> Rows:
    """Return one example for each image, with the questions of all its records.

    Where a record has no options, they are drawn from the answers to other questions of its style.

    Args:
      name: The domain's name.
      path: The table; images are relative to its folder.
      records: The table's records.

    Raises:
      ValueError: There are no records, or one is wrong.
    """
    # The answers of each style; a dict is an ordered set.
    answers: dict[str, dict[str, None]] = collections.defaultdict(dict)
    first: dict[str, Entry] = {}
    others: dict[str, list[Entry]] = collections.defaultdict(list)
    places: dict[str, str] = {}  # of the first record of each image
    for where, record in records:
        entry = _entry(record, where)
        answers[entry.style][entry.answer] = None
        if (known := first.setdefault(entry.image, entry)) is entry:
            places[entry.image] = where
            continue
        label = known.answer if known.label is None else known.label
        if entry.label not in (None, label):
            before = places[entry.image].split(", ")[-1]
            raise ValueError(
                files.line(
                    f"{where}: the label of {files.name(entry.image, 60)} is "
                    f"{files.name(entry.label, 40)!r}, and in {before} it is "
                    f"{files.name(label, 40)!r}; an image has one label"
                )
            )
        others[entry.image].append(entry)
    if not first:
        raise ValueError(
            f"domain {files.name(name, 40)!r} is empty: {files.name(path)} has no rows"
        )
    seen: dict[str, str] = {}
    for image, entry in first.items():
        key, where = entry.key, places[image]
        if key in seen:
            raise ValueError(
                files.line(f"{where}: the id {files.name(key, 60)!r} is also that of {seen[key]}")
            )
        seen[key] = where
    families = {style: tuple(of_style) for style, of_style in answers.items()}
    for style, family in families.items():
        warn_of_twins(f"{files.name(path)}, style {files.name(style, 40)}: the answers", family)
    return Rows(name, os.path.join(path.parent, ""), list(first.values()), others, families)


def warn_of_twins(what: str, texts: Collection[str]) -> None:
    """Warn of texts that differ in case, spaces or Unicode form alone, and so are two classes.

    More than MOST_CLASSES of them are free answers, and no classes.
    """
    known: dict[str, str] = {}
    for text in texts if len(texts) <= MOST_CLASSES else ():
        folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        if (twin := known.setdefault(folded, text)) != text:
            logging.getLogger(__name__).warning(
                files.line(
                    f"{what} {files.name(twin, 40)!r} and {files.name(text, 40)!r} differ in case, "
                    "spaces or Unicode form alone, and count as two; write one of them"
                )
            )
            return


@dataclasses.dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The examples of a table, made when they are needed.

    Attributes:
      name: The domain's name.
      folder: The folder of relative images, with a separator at its end.
      first: The first entry of each image.
      others: The further entries of an image.
      families: The answers of each style.
    """

    name: str
    folder: str
    first: Sequence[Entry]
    others: Mapping[str, Sequence[Entry]]
    families: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.first)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        first = self.first[index]
        entries = (first, *self.others.get(first.image, ()))
        return Row(
            id=first.key,
            label=first.answer if first.label is None else first.label,
            file=os.path.join(self.folder, first.image),
            questions=functools.partial(_questions, self.name, entries, self.families),
            licence=first.licence or "",
        )


def _questions(
    name: str, entries: Sequence[Entry], families: Mapping[str, Sequence[str]]
) -> tuple[questions_lib.Question, ...]:
    """Return the questions of the entries of an image."""

    def question(entry: Entry) -> questions_lib.Question:
        key = f"{name} {entry.image} {entry.question}"
        options = entry.options or questions_lib.options_for(
            entry.answer, families[entry.style], key
        )
        return questions_lib.Question(entry.style, entry.question, entry.answer, tuple(options))

    return tuple(map(question, entries))


def _entry(record: dict[str, Any], where: str) -> Entry:
    """Return a record whose fields are text and whose options are a tuple of texts."""
    _require(record, where, "fields")
    texts = {
        field: value if type(value) is str and value.isascii() else _as_text(value, field, where)
        for field, value in record.items()
        if field in TEXTS
    }
    if empty := [field for field in NEEDED if not texts[field].strip()]:
        raise ValueError(f"{where} lacks the fields {empty}: they are empty")
    options = record.get("options")
    return Entry(
        image=texts["image"],
        question=texts["question"],
        answer=texts["answer"],
        style=texts.get("style", "category"),
        options=_options(options, texts["answer"], where) if options else (),
        label=texts.get("label"),
        id=texts.get("id"),
        licence=texts.get("licence"),
    )


def _options(options: Any, answer: str, where: str) -> tuple[str, ...]:
    if isinstance(options, str):
        options = [part.strip() for part in options.split("|")]
    if not isinstance(options, list):
        raise ValueError(f"{where}: options is a {type(options).__name__}, not a list")
    options = tuple(_as_text(option, "options", where) for option in options)
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        raise ValueError(
            files.line(f"{where}: options {list(options)} must be two or more texts, each once")
        )
    if answer not in options:
        raise ValueError(
            files.line(
                f"{where}: the answer {files.name(answer, 80)!r} is not among its options "
                f"{list(options)}"
            )
        )
    return options


def _as_text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {field} is a {type(value).__name__}, not a text")
    text = str(value)
    if not files.is_text(text):
        raise ValueError(f"{where}: {field} holds half a surrogate pair, which is no letter")
    return text


def _require(present: Collection[str], where: str, what: str) -> None:
    if missing := [field for field in NEEDED if field not in present]:
        has = re.sub(r"\s+", " ", str([files.name(field, 30) for field in list(present)[:12]]))
        raise ValueError(
            files.line(f"{where} lacks the {what} {missing}; it needs {list(NEEDED)} and has {has}")
        )
