"""RSVQA high resolution (Lobry et al. 2020): questions about aerial photographs of the USGS."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from mllm_jax.data import manual
from mllm_jax.data.manual import Need
from mllm_jax.data.vqa import builder
from mllm_jax.data.vqa.builder import Row

_FILE = "USGS_split_{}_{}.json"


class RsvqaHr(builder.VqaBuilder):
    """Aerial photographs with questions on presence, number, area and comparison."""

    HOMEPAGE = "https://zenodo.org/records/6344367"
    LICENCE = "see the homepage"
    NEEDS = (
        *(
            Need(_FILE.format(split, what), _FILE.format(split, what))
            for split in ("train", "val")
            for what in ("questions", "answers")
        ),
        Need("Data/*.*", "the archive of pictures, unpacked so that they lie in Data/"),
    )

    def rows(self, folder: pathlib.Path, split: str) -> Iterator[Row]:
        """Yield the rows of a split, in the order of the released code."""
        questions = manual.read_json(folder / _FILE.format(split, "questions"))["questions"]
        all_answers = manual.read_json(folder / _FILE.format(split, "answers"))["answers"]
        answers = {answer["id"]: answer for answer in all_answers}
        active = [question for question in questions if question["active"]]
        for question in builder.shuffled(active, 4):
            answer = str(answers[question["answers_ids"][0]]["answer"])
            name = str(question["img_id"])
            yield Row(
                id=str(question["id"]),
                picture=name,
                files=(_picture(folder / "Data", name),),
                question=question["question"],
                answer=answer,
                answers=(answer,),
                type=question.get("type", ""),
            )


def _picture(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the file of a picture: TIFF, as the pictures were cut, or PNG."""
    tiff = folder / f"{name}.tif"
    return tiff if tiff.exists() else folder / f"{name}.png"


Builder = RsvqaHr
