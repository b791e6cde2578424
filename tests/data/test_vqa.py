"""Each data set of MMNeuron, built from a tiny tree in the layout of its download."""

from __future__ import annotations

import io
import random
import re
import sys

import numpy as np
import PIL.Image
import pytest

from mllm_jax.data import vqa
from mllm_jax.data.vqa import builder, prompts
from mllm_jax.evaluation.metrics import datasets, lingo_judge
from tests.helpers.vqa_trees import TREES, picture, rsvqa_hr, vqav2

pytest.importorskip("tensorflow_datasets")
SHORT = "\nAnswer the question using a single word or phrase."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: {} ASSISTANT:"
)


PICTURES = {"vqav2": 6, "pmc_vqa": 5, "rsvqa_hr": 4, "lingoqa": 6, "docvqa": 4}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every data set, built: the root."""
    manual, root = tmp_path_factory.mktemp("manual"), tmp_path_factory.mktemp("root")
    for name, tree in TREES.items():
        tree(manual / name)
        vqa.build(name, manual, root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.array_record*")}
    assert len(before) == 2 * len(TREES)
    vqa.build("vqav2", manual, root)  # there already
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*.array_record*")}
    return root


def load(root, name, split="val", **options):
    return vqa.load(name, split, root=root, **{"model": "llava_next", **options})


@pytest.mark.parametrize("name", TREES)
def test_every_data_set(built, name):
    assert "tensorflow" not in sys.modules
    for split in ("train", "val"):
        domain = load(built, name, split)
        assert (domain.name, domain.split, len(domain)) == (name, split, PICTURES[name])
        for example in domain:
            (question,) = example.questions
            assert question.text in question.prompt and question.answer in question.options
            assert example.image.size == ((30, 4) if name == "lingoqa" else (6, 4))
        if name != "lingoqa":
            assert len({example.source for example in domain}) == len(domain)
        assert len({example.id for example in domain}) == len(domain)


def first_of_each(pairs):
    """Of (picture, question) pairs, the first question of each picture."""
    found = {}
    for image, question in pairs:
        found.setdefault(image, question)
    return list(found.values())


def test_vqav2_order_and_answers(built):
    domain = load(built, "vqav2", "train")
    pairs = [(i // 2, f"train {i}?") for i in range(12)]
    random.Random(4).shuffle(pairs)
    assert [example.questions[0].text for example in domain] == first_of_each(pairs)
    question = domain[0].questions[0]
    assert question.answers == ("yes",) * 6 + ("no",) * 4 and question.confidence[:2] == (
        "yes",
        "maybe",
    )
    assert (question.answer, question.options, question.type) == ("yes", ("yes", "no"), "yes/no")
    image = int(question.id) // 2 + 100
    assert domain[0].encoded == picture(image)
    assert domain[0].source == f"COCO_train2014_{image:012}.jpg"


def test_pmc_vqa_order_and_choices(built):
    domain = load(built, "pmc_vqa", "train")
    order = np.random.RandomState(42).permutation(20) % 10
    expected = first_of_each((i // 2, f"train, {i}?") for i in order)
    assert [example.questions[0].text for example in domain] == expected
    for example in domain:
        question = example.questions[0]
        assert question.answer == ("B" if int(question.id.split()[1]) % 2 else "C")
        assert question.choices == (" A:it's a", " B:it's b", " C:it's c", " D:it's d")
        assert question.style == "choice" and question.options == tuple("ABCD")
    assert all(
        "test_clean" in example.questions[0].text for example in load(built, "pmc_vqa", "val")
    )


def test_rsvqa_hr_order_answers_and_tiff(built):
    domain = load(built, "rsvqa_hr", "val")
    pairs = [(i // 2, f"val {i}?") for i in range(8)]
    random.Random(4).shuffle(pairs)
    assert [example.questions[0].text for example in domain] == first_of_each(pairs)
    for example in domain:
        question = example.questions[0]
        assert question.text == f"val {question.answer}?" and question.type == "count"
        wanted = PIL.Image.open(io.BytesIO(picture(int(example.source), "PNG")))
        np.testing.assert_array_equal(np.asarray(example.image), np.asarray(wanted))
        assert example.encoded[1:4] == b"PNG"


def test_lingoqa_keeps_every_row_and_joins_frames(built):
    domain = load(built, "lingoqa", "val")
    order = np.random.RandomState(42).permutation(6)
    assert [e.questions[0].answer for e in domain] == [f"Answer {i}" for i in order]
    assert [e.questions[0].id for e in domain] == [f"q{i // 2}" for i in order]
    frames = [PIL.Image.open(io.BytesIO(picture(10 * (order[0] // 2) + k))) for k in range(5)]
    wide = np.concatenate([np.asarray(frame) for frame in frames], axis=1)
    np.testing.assert_array_equal(np.asarray(domain[0].image), wide)


def test_docvqa_order_pages_and_answers(built):
    domain = load(built, "docvqa", "val")
    order = np.random.default_rng(42).permutation(8)
    expected = first_of_each((i // 2, f"validation {i}?") for i in order)
    assert [example.questions[0].text for example in domain] == expected
    for example in domain:
        number = int(example.questions[0].id)
        assert example.questions[0].answers == (f"Page {number}", "page")
        assert example.encoded == picture(number // 2, "PNG")
        assert example.source == f"documents/{number // 2}.png"


def test_sizes(tmp_path):
    sizes = {size.name: (size.train, size.val) for size in builder.VqaBuilder.BUILDER_CONFIGS}
    assert sizes == {"paper": (10_001, 1_001), "full": (None, None)}
    vqav2(tmp_path / "manual" / "vqav2")
    kind = vqa._builder("vqav2")
    small = kind(
        data_dir=str(tmp_path),
        config=builder.Size(name="small", train=3),
        file_format="array_record",
    )
    chosen = list(small._generate_examples(tmp_path / "manual" / "vqav2", "train"))
    assert [key for key, _ in chosen] == [0, 1, 2]
    assert len(list(small._generate_examples(tmp_path / "manual" / "vqav2", "val"))) == 6


def test_metrics_read_the_questions(built):
    judge = lingo_judge.Judge(lingo_judge.FALLBACK, lingo_judge.token_f1)
    for name in vqa.NAMES:
        questions = [example.questions[0] for example in load(built, name)]
        right = datasets.score(name, [q.answer for q in questions], questions, judge=judge)
        wrong = datasets.score(name, ["?"] * len(questions), questions, judge=judge)
        assert right.min() >= 0.9 and wrong.max() == 0, name


@pytest.mark.parametrize("name", TREES)
def test_what_is_missing_is_listed(name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        vqa.build(name, tmp_path, tmp_path / "root")
    lines = str(error.value).splitlines()
    needs = vqa._builder(name).NEEDS
    assert lines[0].startswith(f"{name}: missing in {tmp_path / name}, to be downloaded from http")
    assert len(lines) == 1 + len(needs)
    for line, need in zip(lines[1:], needs):
        assert line.split() == [*need.path.split(), *need.source.split()]
    TREES[name](tmp_path / name)
    vqa._builder(name).require(tmp_path / name)


def test_one_missing_file_is_the_one_that_is_listed(tmp_path):
    vqav2(tmp_path / "vqav2")
    (tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        vqa.build("vqav2", tmp_path, tmp_path / "root")
    assert [line.split()[0] for line in str(error.value).splitlines()[1:]] == [
        "v2_mscoco_val2014_annotations.json"
    ]


def test_a_missing_picture_is_named_and_leaves_nothing(tmp_path):
    rsvqa_hr(tmp_path / "rsvqa_hr")
    (tmp_path / "rsvqa_hr" / "Data" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"rsvqa_hr: the picture .*2.png cannot be read"):
        vqa.build("rsvqa_hr", tmp_path, tmp_path / "root")
    assert not list((tmp_path / "root").rglob("dataset_info.json"))
    with pytest.raises(
        FileNotFoundError, match=r"rsvqa_hr \(paper\) is not built .* run .*build\('rsvqa_hr'"
    ):
        load(tmp_path / "root", "rsvqa_hr")


def test_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'coco'; known are lingoqa"):
        vqa.instructions("coco")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        load(tmp_path, "vqav2", "test")
    with pytest.raises(ValueError, match="unknown size 'tiny'"):
        load(tmp_path, "vqav2", size="tiny")
    assert "train2014.zip" in vqa.instructions("vqav2")


def test_frames_must_be_of_one_height():
    with pytest.raises(ValueError, match=r"one height, not \[4, 5\]"):
        vqa.side_by_side([picture(0), picture(1, size=(6, 5))])


def test_prompts_of_the_domains(built):
    def prompt(name, **how):
        return load(built, name, **how)[0].questions[0].prompt

    for name in vqa.NAMES:
        question = load(built, name)[0].questions[0]
        assert prompt(name, of="activation") == f"<image>\n{question.text}"
    for name in ("vqav2", "docvqa", "rsvqa_hr"):
        text = load(built, name)[0].questions[0].text
        body = f"<image>\nQuestion: {text}{SHORT}"
        assert prompt(name, of="lens", model="instructblip") == body
        assert prompt(name) == VICUNA.format(body)
        assert prompt(name, model="instructblip") == f"<image>Question: {text} Short Answer:"


def test_a_manifest_names_the_version_that_is_read(built):
    found = {name: load(built, name).fingerprint for name in vqa.NAMES}
    for name, fingerprint in found.items():
        assert re.fullmatch(rf"{name}/paper/1\.0\.0 sha256:[0-9a-f]{{64}}", fingerprint)
    assert len({fingerprint.split(":")[1] for fingerprint in found.values()}) == len(found)


def test_prompt_of_choices():
    choices = ("A:x", "B:it's", "C:y", "D:z")
    listed = """['A:x', "B:it's", 'C:y', 'D:z']"""
    letter = "Answer with the option's letter from the given choices directly."
    assert prompts.prompt("pmc_vqa", "Which?", choices, model="llava_next", of="lens") == (
        f"<image>\nQuestion: Which?\nContext: N/A\nOptions: {listed}\n\n{letter}"
    )
    assert prompts.prompt("pmc_vqa", "Which?", choices, model="instructblip") == (
        f"<image>Question: Which?\n\nOptions: {listed}\n\n{letter}"
    )


def test_prompt_of_driving():
    made = prompts.prompt("lingoqa", "Is it safe?", model="instructblip")
    assert made.startswith(
        "<image>Role: You are an advanced AI assistant installed on the Ego vehicle, equipped"
    )
    assert made.endswith(
        "Ego vehicle itself is not visible in the images provided. Question: Is it safe?"
    )
    same = prompts.prompt("lingoqa", "Is it safe?", model="llava_next")
    assert same == VICUNA.format("<image>\n" + made.removeprefix("<image>"))


@pytest.mark.parametrize(
    "arguments, how, message",
    [
        (("coco", "?"), {"model": "llava_next"}, "unknown data set 'coco'"),
        (
            ("vqav2", "?"),
            {"model": "llava"},
            "unknown model 'llava'; known are llava_next, instructblip",
        ),
        (("vqav2", "?"), {"model": "llava_next", "of": "train"}, "unknown pass 'train'"),
        (("vqav2", "?", ["a"]), {"model": "llava_next"}, "only pmc_vqa takes choices"),
        (("pmc_vqa", "?"), {"model": "llava_next"}, "only pmc_vqa takes choices"),
    ],
)
def test_prompt_errors(arguments, how, message):
    with pytest.raises(ValueError, match=message):
        prompts.prompt(*arguments, **how)


def test_data_sets_may_be_in_a_bucket():
    folder = vqa._root("gs://bucket/sets") / "vqav2" / "paper"
    assert str(folder) == "gs://bucket/sets/vqav2/paper"
