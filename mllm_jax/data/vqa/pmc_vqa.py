"""PMC-VQA (Zhang et al. 2023): figures of medical articles with four choices.

The released code expects a `val.csv`, which the data set does not have; the verified test set
replaces it. It also reads the training table twice; the resulting order is kept, which is harmless
since one question of each picture is used.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterator

from mllm_jax.data.manual import Need
from mllm_jax.data.vqa import builder
from mllm_jax.data.vqa.builder import Row

_TABLES = {"train": "train.csv", "val": "test_clean.csv"}
_LETTERS = "ABCD"


class PmcVqa(builder.VqaBuilder):
    """Figures of medical articles with multiple-choice questions."""

    HOMEPAGE = "https://huggingface.co/datasets/xmcmic/PMC-VQA"
    LICENCE = "CC BY-SA"
    NEEDS = (
        Need("train.csv", "train.csv"),
        Need("test_clean.csv", "test_clean.csv"),
        Need("images/*.jpg", "images.zip, unpacked so that the pictures lie in images/"),
    )

    def rows(self, folder: pathlib.Path, split: str) -> Iterator[Row]:
        """Yield the rows of a split, in the order of the released code."""
        path = folder / _TABLES[split]
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
        for index in builder.pandas_order(2 * len(table), 42) % len(table):
            row = table[index]
            answer = row.get("Answer_label", "").strip()
            answer = answer if answer in tuple(_LETTERS) else row["Answer"].strip()
            if answer not in tuple(_LETTERS):
                raise ValueError(f"{path}, row {index + 1}: the answer {answer!r} is not a letter")
            yield Row(
                id=f"{split} {index}",
                picture=row["Figure_path"],
                files=(folder / "images" / row["Figure_path"],),
                question=row["Question"],
                answer=answer,
                answers=(answer,),
                choices=tuple(row[f"Choice {letter}"] for letter in _LETTERS),
            )


Builder = PmcVqa
