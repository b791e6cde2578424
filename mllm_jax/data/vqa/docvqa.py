"""DocVQA, single page (Mathew et al. 2021), in the parquet files that the released code reads."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from mllm_jax.data.manual import Need
from mllm_jax.data.vqa import builder
from mllm_jax.data.vqa.builder import Row

_SHARDS = {"train": "data/train-*.parquet", "val": "data/validation-*.parquet"}


class Docvqa(builder.VqaBuilder):
    """Scanned pages with questions and every annotator's answer."""

    HOMEPAGE = "https://huggingface.co/datasets/pixparse/docvqa-single-page-questions"
    LICENCE = "see https://www.docvqa.org"
    NEEDS = tuple(Need(shards, "all files of that name") for shards in _SHARDS.values())

    def rows(self, folder: pathlib.Path, split: str) -> Iterator[Row]:
        """Yield the rows of a split, in the order of the released code."""
        columns = ["question_id", "question", "answers", "other_metadata"]
        table = [
            row
            for shard in sorted(folder.glob(_SHARDS[split]))
            for row in builder.parquet().read_table(shard, columns=columns).to_pylist()
        ]
        for index in builder.datasets_order(len(table), 42):
            row = table[index]
            yield Row(
                id=str(row["question_id"]),
                picture=row["other_metadata"]["image"],
                files=(),
                question=row["question"],
                answer=row["answers"][0],
                answers=tuple(row["answers"]),
            )

    def pictures(
        self, folder: pathlib.Path, split: str, rows: Sequence[Row]
    ) -> Iterator[list[bytes]]:
        """Yield the pages; the shards are read once, and pages wait in a file for their turn."""
        wanted = {row.picture for row in rows}
        where: dict[str, tuple[int, int]] = {}
        with tempfile.TemporaryFile(dir=self.data_path.parent) as pages:
            for shard in sorted(folder.glob(_SHARDS[split])):
                file = builder.parquet().ParquetFile(shard)
                for batch in file.iter_batches(64, columns=["image", "other_metadata"]):
                    for row in batch.to_pylist():
                        name = row["other_metadata"]["image"]
                        if name in wanted and name not in where:
                            where[name] = pages.tell(), pages.write(row["image"]["bytes"])
            for row in rows:
                start, size = where[row.picture]
                pages.seek(start)
                yield [pages.read(size)]


Builder = Docvqa
