"""VQAv2 on COCO 2014 (Goyal et al. 2017): the common scenes."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from mllm_jax.data import manual
from mllm_jax.data.manual import Need
from mllm_jax.data.vqa import builder
from mllm_jax.data.vqa.builder import Row

_QUESTIONS = "v2_OpenEnded_mscoco_{}2014_questions.json"
_ANNOTATIONS = "v2_mscoco_{}2014_annotations.json"
_COCO = "http://images.cocodataset.org/zips/{}2014.zip, unpacked"


class Vqav2(builder.VqaBuilder):
    """Questions about COCO photographs, with the answers of ten people."""

    HOMEPAGE = "https://visualqa.org/download.html"
    LICENCE = "annotations CC BY 4.0; photographs under the terms of Flickr"
    NEEDS = tuple(
        need
        for split, name in (("train", "Training"), ("val", "Validation"))
        for need in (
            Need(_QUESTIONS.format(split), f"{name} questions 2017 v2.0, unpacked"),
            Need(_ANNOTATIONS.format(split), f"{name} annotations 2017 v2.0, unpacked"),
            Need(f"{split}2014/COCO_{split}2014_*.jpg", _COCO.format(split)),
        )
    )

    def rows(self, folder: pathlib.Path, split: str) -> Iterator[Row]:
        """Yield the rows of a split, in the order of the released code."""
        questions = manual.read_json(folder / _QUESTIONS.format(split))["questions"]
        annotations = manual.read_json(folder / _ANNOTATIONS.format(split))["annotations"]
        annotation_of = {annotation["question_id"]: annotation for annotation in annotations}
        for question in builder.shuffled(questions, 4):
            annotation = annotation_of[question["question_id"]]
            answers = tuple(entry["answer"] for entry in annotation["answers"])
            common = annotation.get("multiple_choice_answer")
            name = f"COCO_{split}2014_{question['image_id']:012}.jpg"
            yield Row(
                id=str(question["question_id"]),
                picture=name,
                files=(folder / f"{split}2014" / name,),
                question=question["question"],
                answer=common if common in answers else answers[0],
                answers=answers,
                confidence=tuple(entry["answer_confidence"] for entry in annotation["answers"]),
                type=annotation["answer_type"],
            )


Builder = Vqav2
