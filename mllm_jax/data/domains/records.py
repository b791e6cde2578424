"""Examples as records of array_record files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable

from mllm_jax.data.domains.examples import Example
from mllm_jax.data.embedded.questions import Question
from mllm_jax.data.sequences import LazySequence

SPLITS = ("test", "train")
VERSION = "1"  # of the format; another version is another folder of the cache


def pack(example: Example) -> bytes:
    """Return an example as one record.

    A record is the length of a JSON header in four bytes, the header, and the image file's bytes.
    """
    fields = {f.name: getattr(example, f.name) for f in dataclasses.fields(example)}
    encoded = fields.pop("encoded")
    fields["questions"] = [dataclasses.asdict(question) for question in example.questions]
    header = json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()
    return len(header).to_bytes(4, "big") + header + encoded


def unpack(record: bytes) -> Example:
    """Return the example of a record that `pack` made."""
    size = 4 + int.from_bytes(record[:4], "big")
    fields = json.loads(record[4:size])
    fields["questions"] = tuple(
        Question(**{**question, "options": tuple(question["options"])})
        for question in fields["questions"]
    )
    return Example(**fields, encoded=record[size:])


def write(path: pathlib.Path, examples: Iterable[Example]) -> None:
    """Write examples into a new array_record file, one record per group."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        writer.write(pack(example))
    writer.close()


class Records(LazySequence[Example]):
    """The examples of an array_record file, read one at a time.

    Args:
      path: The file.

    Raises:
      ValueError: The file cannot be read.
    """

    def __init__(self, path: pathlib.Path):
        from array_record.python import array_record_data_source

        try:
            self._source = array_record_data_source.ArrayRecordDataSource(str(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): delete its folder to build it again"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def item(self, index: int) -> Example:
        """Return the item at an index; see `LazySequence`."""
        return unpack(self._source[index])
