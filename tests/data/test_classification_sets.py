"""Each data set of the projection study, built from a tiny tree in the layout of its download."""

from __future__ import annotations

import collections
import io
import sys

import numpy as np
import PIL.Image
import pytest

from mllm_jax.data import classification, domains, tasks

pytest.importorskip("tensorflow_datasets")


def picture(seed: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).resize((60, 48)).save(out, kind)
    return out.getvalue()


def put(path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def kind_of(name: str):
    return classification._builder(name)


def in_folders(folder, name: str, lacking: str = "") -> None:
    """Three pictures of each class to train on, two to test on; and what is no picture."""
    for split, count in (("train", 3), ("test", 2)):
        for at, label in enumerate(kind_of(name).LABELS):
            for number in range(count):
                if not (split == "test" and label == lacking):
                    seed = 100 * at + number + 10 * (split == "test")
                    put(folder / split / label / f"0{number}.jpg", picture(seed))
    put(folder / "train" / kind_of(name).LABELS[0] / ".DS_Store", b"")
    put(folder / "README.md", b"")


def plantdoc(folder) -> None:
    in_folders(folder, "plantdoc", lacking="Tomato two spotted spider mites leaf")
    put(folder / "train" / "Apple leaf" / "odd.jpg", picture(9999, "PNG"))


def dermnet(folder) -> None:
    in_folders(folder, "dermnet")


def dtd(folder) -> None:
    for at, label in enumerate(kind_of("dtd").LABELS):
        for number, split in enumerate(("train", "val", "test")):
            name = f"{label}/{label}_{number:04}.jpg"
            put(folder / "images" / name, picture(10 * at + number))
            for partition in (1, 2):
                path = folder / "labels" / f"{split}{partition}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(name + "\n" if partition == 1 else "other/other.jpg\n")


COLUMNS = (
    "event_name", "tweet_id", "image_id", "tweet_text", "image", "label", "label_text",
    "label_image", "label_text_image",
)  # fmt: skip


def crisismmd(folder) -> None:
    """Two pictures of each label a split; the texts say otherwise, and hold quotation marks."""
    labels = kind_of("crisismmd").LABELS
    for base, split in enumerate(("train", "dev", "test")):
        rows = ["\t".join(COLUMNS)]
        for at, label in enumerate(labels * 2):
            image = f"data_image/hurricane_irma/{base + 6}_9_2017/90{base}_{at}.jpg"
            put(folder / image, picture(100 * base + at))
            text = '"they said: help' if at % 2 else "RT"
            other = labels[(at + 1) % len(labels)]
            rows.append(
                f"hurricane_irma\t90{base}\t90{base}_{at}\t{text}\t{image}\t{other}\t{other}\t{label}\tx"
            )
        path = folder / "crisismmd_datasplit_all" / f"task_humanitarian_text_img_{split}.tsv"
        put(path, ("\n".join(rows) + "\n").encode())


TREES = {"plantdoc": plantdoc, "dtd": dtd, "dermnet": dermnet, "crisismmd": crisismmd}
COUNTS = {  # of labels, of the paper's classes, and of pictures
    "plantdoc": (28, 28, {"train": 85, "test": 54}),
    "dtd": (47, 47, {"train": 47, "val": 47, "test": 47}),
    "dermnet": (23, 23, {"train": 69, "test": 46}),
    "crisismmd": (8, 4, {"train": 16, "val": 16, "test": 16}),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every data set, built: the root."""
    manual, root = tmp_path_factory.mktemp("manual"), tmp_path_factory.mktemp("root")
    for name, tree in TREES.items():
        tree(manual / name)
        classification.build(name, manual, root)
    return root


@pytest.mark.parametrize("name", TREES)
def test_every_data_set(built, name):
    assert "tensorflow" not in sys.modules
    labels, classes, counts = COUNTS[name]
    kind = kind_of(name)
    assert (len(kind.LABELS), len(kind.CLASSES)) == (labels, classes)
    assert list(kind.LABELS) == sorted(kind.LABELS)
    for split, count in counts.items():
        domain = classification.load(name, split, root=built)
        assert (domain.name, domain.split, len(domain)) == (name, split, count)
        assert len({shown.id for shown in domain}) == count
        assert {shown.label for shown in domain} <= set(kind.LABELS)
        assert domain[0].image.size == (60, 48)


def test_pictures_have_the_label_of_their_folder(built):
    domain = classification.load("plantdoc", "train", root=built)
    labels = kind_of("plantdoc").LABELS
    for shown in domain:
        split, folder, file = shown.source.split("/")
        assert (split, folder) == ("train", shown.label)
        if file != "odd.jpg":
            seed = 100 * labels.index(folder) + int(file.split(".")[0])
            assert shown.encoded == picture(seed)
    assert any(shown.encoded[1:4] == b"PNG" for shown in domain)


def test_dtd_is_the_first_partition(built):
    for number, split in enumerate(("train", "val", "test")):
        for at, shown in enumerate(classification.load("dtd", split, root=built)):
            label = kind_of("dtd").LABELS[at]
            assert shown.label == label and shown.source == f"{label}/{label}_{number:04}.jpg"
            assert shown.encoded == picture(10 * at + number)


def test_crisismmd_has_what_is_seen_in_the_picture(built):
    for base, split in enumerate(("train", "val", "test")):
        for at, shown in enumerate(classification.load("crisismmd", split, root=built)):
            assert shown.label == kind_of("crisismmd").LABELS[at % 8]
            assert shown.source == f"90{base}_{at}" and shown.encoded == picture(100 * base + at)


@pytest.mark.parametrize("name", TREES)
def test_tasks_have_the_papers_classes_and_all_pictures(built, name):
    task = classification.task(name, root=built)
    kind, (_, classes, counts) = kind_of(name), COUNTS[name]
    assert isinstance(task, tasks.Task) and task.topic == kind.TOPIC
    assert task.classes == tuple(kind.CLASSES) and len(task.classes) == classes
    share = classes / len(kind.LABELS)
    assert task.counts("test").sum() == counts["test"] * share
    kept = task.counts("train").sum() + task.counts("held").sum()
    assert kept == (counts["train"] + counts.get("val", 0)) * share
    ids = {split: {shown.id for shown in task[split]} for split in tasks.SPLITS}
    assert not ids["train"] & ids["held"] and not ids["train"] & ids["test"]
    if "val" in counts:
        assert {name.split()[0] for name in ids["held"]} == {"val"}


def test_spelling_of_classes(built):
    task = classification.task("crisismmd", root=built)
    assert task.classes == (
        "affected individuals", "infrastructure and utility damage",
        "rescue volunteering or donation effort", "vehicle damage",
    )  # fmt: skip
    assert collections.Counter(shown.label for shown in task.test) == dict.fromkeys(task.classes, 2)
    official = classification.task("crisismmd", spelling="official", root=built)
    assert official.classes[-1] == "vehicledamage"
    np.testing.assert_array_equal(official.ids("test"), task.ids("test"))
    plants = classification.task("plantdoc", spelling="official", root=built)
    assert "Bellpepper leaf" in plants.classes and plants.counts("test").min() == 0


def test_near_copies_of_test_pictures_can_be_left_out(tmp_path):
    dtd(tmp_path / "manual" / "dtd")
    first = kind_of("dtd").LABELS[0]
    folder = tmp_path / "manual" / "dtd"
    put(folder / "images" / first / f"{first}_copy.jpg", picture(2))  # that of test
    with (folder / "labels" / "train1.txt").open("a") as file:
        file.write(f"{first}/{first}_copy.jpg\n")
    classification.build("dtd", tmp_path / "manual", tmp_path / "root")
    sizes = [
        len(classification.task("dtd", near_copy=near, root=tmp_path / "root").train)
        for near in (None, 0.98)
    ]
    assert sizes == [48, 47]


@pytest.mark.parametrize("name", TREES)
def test_what_is_missing_is_listed(name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        classification.build(name, tmp_path, tmp_path / "root")
    lines, needs = str(error.value).splitlines(), kind_of(name).NEEDS
    assert lines[0].startswith(f"{name}: missing in {tmp_path / name}, to be downloaded from http")
    assert len(lines) == 1 + len(needs)
    for line, need in zip(lines[1:], needs, strict=True):
        assert line.split() == [*need.path.split(), *need.source.split()]
    assert needs[0].path in classification.instructions(name)


def test_what_is_wrong_is_said(tmp_path, built):
    with pytest.raises(ValueError, match="unknown data set 'coco'; known are plantdoc, dtd"):
        classification.instructions("coco")
    with pytest.raises(ValueError, match="unknown split 'val'; known are train, test"):
        classification.load("dermnet", "val", root=built)
    with pytest.raises(ValueError, match="unknown spelling 'my'; known are corrected, official"):
        classification.task("dtd", spelling="my", root=built)
    with pytest.raises(FileNotFoundError, match=r"dtd is not built in .* run .*build\('dtd'"):
        classification.load("dtd", "train", root=tmp_path)
    dermnet(tmp_path / "dermnet")
    put(tmp_path / "dermnet" / "test" / "Skin" / "1.jpg", picture(0))
    with pytest.raises(
        ValueError, match=r"dermnet: test/Skin/1.jpg .* label 'Skin', which is not one"
    ):
        classification.build("dermnet", tmp_path, tmp_path / "root")
    assert not list((tmp_path / "root").rglob("dataset_info.json"))


def test_a_missing_picture_is_named(tmp_path):
    dtd(tmp_path / "dtd")
    next((tmp_path / "dtd" / "images").glob("woven/*_0002.jpg")).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"dtd: the picture .*woven_0002.jpg cannot be read"
    ):
        classification.build("dtd", tmp_path, tmp_path / "root")


def test_a_domain_of_a_data_set_is_a_domain(built):
    assert isinstance(classification.load("dtd", "val", root=built), domains.Domain)


def test_dtd_that_tfds_has_prepared_itself(tmp_path):
    import tensorflow_datasets as tfds

    class Dtd(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """With the version and the features of the builder in TFDS's catalogue."""

        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            features = tfds.features
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict({
                "file_name": features.Text(), "image": features.Image(),
                "label": features.ClassLabel(names=["woven", "banded"]),
            }))  # fmt: skip

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "validation")}

        def _generate_examples(self, split):
            for at, label in enumerate(("woven", "banded")):
                file = tmp_path / f"{split}{label}.jpg"
                file.write_bytes(picture(at))
                name = f"{label}/{label}_{split}.jpg"
                yield name, {"file_name": name, "image": str(file), "label": label}

    Dtd(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    domain = classification.load("dtd", "val", root=tmp_path)
    found = {shown.label: shown for shown in domain}
    assert sorted(found) == ["banded", "woven"]
    assert found["banded"].encoded == picture(1)
    assert found["woven"].source == "woven/woven_validation.jpg"
    assert "tensorflow" not in sys.modules
