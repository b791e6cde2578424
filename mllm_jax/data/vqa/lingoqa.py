"""LingoQA (Marcu et al. 2023): questions about drives, the frames of a segment side by side.

Every row of the tables is used: rows that share a question's id are answers of several people to
one question. The paper does not state whether it counts neurons on the part `scenery` or `action`;
the part in train/ is used.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from mllm_jax.data.manual import Need
from mllm_jax.data.vqa import builder
from mllm_jax.data.vqa.builder import Row


class Lingoqa(builder.VqaBuilder):
    """Drives in five frames with free questions and answers."""

    HOMEPAGE = "https://github.com/wayveai/LingoQA"
    LICENCE = "see the homepage"
    ONE_A_PICTURE = False
    NEEDS = (
        Need("train/train.parquet", "train.parquet of the folder `scenery` (or `action`)"),
        Need("train/images/train/*/*.jpg", "images.zip of the same folder, unpacked"),
        Need("val/val.parquet", "val.parquet of the folder `evaluation`"),
        Need("val/images/val/*/*.jpg", "images.zip of the same folder, unpacked"),
    )

    def rows(self, folder: pathlib.Path, split: str) -> Iterator[Row]:
        """Yield the rows of a split, in the order of the released code."""
        path = folder / split / f"{split}.parquet"
        columns = ["question_id", "segment_id", "images", "question", "answer"]
        table = builder.parquet().read_table(path, columns=columns).to_pylist()
        for index in builder.pandas_order(len(table), 42):
            row = table[index]
            yield Row(
                id=row["question_id"],
                picture=row["segment_id"],
                files=tuple(folder / split / name for name in row["images"]),
                question=row["question"],
                answer=row["answer"],
                answers=(row["answer"],),
            )


Builder = Lingoqa
