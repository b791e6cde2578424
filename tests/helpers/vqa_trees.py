"""The five data sets of MMNeuron as tiny trees in the layout of their downloads."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import PIL.Image
import pytest


def picture(seed: int, kind: str = "JPEG", size=(6, 4)) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def put(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(data)


def vqav2(folder):
    """6 pictures, 2 questions each."""
    for split in ("train", "val"):
        questions, annotations = [], []
        for i in range(12):
            image = 100 + i // 2
            questions.append({"image_id": image, "question": f"{split} {i}?", "question_id": i})
            answers = [
                {
                    "answer": "yes" if k < 6 else "no",
                    "answer_confidence": "maybe" if k else "yes",
                    "answer_id": k,
                }
                for k in range(10)
            ]
            annotations.append(
                {"question_id": i, "image_id": image, "answers": answers, "answer_type": "yes/no",
                 "question_type": "is", "multiple_choice_answer": "yes"}
            )  # fmt: skip
            put(folder / f"{split}2014" / f"COCO_{split}2014_{image:012}.jpg", picture(image))
        put(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
        put(folder / f"v2_mscoco_{split}2014_annotations.json", {"annotations": annotations})


def pmc_vqa(folder):
    """5 pictures, 2 questions each; the label stands in one of two columns."""
    for name in ("train", "test_clean"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            columns = [
                "Figure_path",
                "Question",
                "Answer",
                *(f"Choice {l}" for l in "ABCD"),
                "Answer_label",
            ]
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for i in range(10):
                choices = {f"Choice {l}": f" {l}:it's {l.lower()}" for l in "ABCD"}
                label = (
                    {"Answer": "it's b", "Answer_label": "B"}
                    if i % 2
                    else {"Answer": "C", "Answer_label": ""}
                )
                row = {
                    "Figure_path": f"PMC{i // 2}.jpg",
                    "Question": f"{name}, {i}?",
                    **choices,
                    **label,
                }
                writer.writerow(row)
    for i in range(5):
        put(folder / "images" / f"PMC{i}.jpg", picture(i))


def rsvqa_hr(folder):
    """4 pictures, one of them TIFF, 2 active questions each and others that are not."""
    for split in ("train", "val"):
        questions, answers = [], []
        for i in range(10):
            active = i < 8
            questions.append(
                {"id": i, "img_id": i // 2, "type": "count", "question": f"{split} {i}?", "answers_ids": [9 - i], "active": True}
                if active else {"id": i, "active": False}
            )  # fmt: skip
            answers.append({"id": 9 - i, "question_id": i, "answer": str(i), "active": True})
        put(folder / f"USGS_split_{split}_questions.json", {"questions": questions})
        put(folder / f"USGS_split_{split}_answers.json", {"answers": answers})
    for i in range(4):
        put(
            folder / "Data" / f"{i}.{'tif' if i == 1 else 'png'}",
            picture(i, "TIFF" if i == 1 else "PNG"),
        )


def lingoqa(folder):
    """3 segments of 5 frames; each question has two rows."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split in ("train", "val"):
        rows = []
        for i in range(6):
            frames = [f"images/{split}/segment{i // 2}/{k}.jpg" for k in range(5)]
            for k, name in enumerate(frames):
                put(folder / split / name, picture(10 * (i // 2) + k))
            rows.append({"question_id": f"q{i // 2}", "segment_id": f"segment{i // 2}", "images": frames,
                         "question": f"{split} {i // 2}?", "answer": f"Answer {i}"})  # fmt: skip
        parquet.write_table(arrow.Table.from_pylist(rows), folder / split / f"{split}.parquet")


def docvqa(folder):
    """4 pages, 2 questions each, in two shards."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split in ("train", "validation"):
        rows = [
            {"image": {"bytes": picture(i // 2, "PNG"), "path": None}, "question_id": i,
             "question": f"{split} {i}?", "answers": [f"Page {i}", "page"],
             "other_metadata": {"image": f"documents/{i // 2}.png", "data_split": split}}
            for i in range(8)
        ]  # fmt: skip
        for shard in range(2):
            path = folder / "data" / f"{split}-{shard:05}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(arrow.Table.from_pylist(rows[4 * shard : 4 * shard + 4]), path)


TREES = {
    "vqav2": vqav2,
    "pmc_vqa": pmc_vqa,
    "rsvqa_hr": rsvqa_hr,
    "lingoqa": lingoqa,
    "docvqa": docvqa,
}
