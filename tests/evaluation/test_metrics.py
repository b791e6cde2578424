from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.data.vqa.questions import VqaQuestion
from mllm_jax.evaluation.metrics import datasets, lingo_judge, official, text, vqa


@pytest.mark.parametrize(
    "raw, normal",
    [
        ("Two dogs.", "2 dogs"),
        ("the red, green and blue", "red green and blue"),
        ("1,000", "1000"),
        ("1,000/day", "1000day"),  # a comma between digits removes every other mark too
        ("well-known", "well known"),
        ("well -known", "well known"),
        ("3.5 ft.", "3.5 ft"),
        ("none", "0"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("dont", "don't"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("wed've", "we'd've"),
        ("A An The", ""),
        ("twenty one", "twenty 1"),
        ("." * 33 + "a", "." + "a"),  # only 32 periods go
    ],
)
def test_vqa_normalisation(raw, normal):
    assert vqa.normalise(raw) == normal


def test_every_official_contraction_is_there():
    assert len(vqa._MENDED) == 114
    assert vqa._MENDED["y'alld've"] == "y'all'd've" and vqa._MENDED["ow's'at"] == "'ow's'at"


@pytest.mark.parametrize(
    "prediction, answers, expected",
    [
        ("yes", ["yes"] * 10, 1.0),
        ("yes", ["yes"] * 1 + ["no"] * 9, 0.3),  # 9 of 10 leave it in: 9 * (1/3) / 10
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
        ("yes", ["yes"] * 3 + ["no"] * 7, 0.9),
        ("yes", ["yes"] * 4 + ["no"] * 6, 1.0),
        ("Two", ["2"] * 5 + ["two"] * 5, 1.0),
        ("Two", ["2"] * 10, 0.0),  # people agree: nothing is normalised
        ("2\n", ["2"] * 10, 1.0),
    ],
)
def test_vqa_accuracy(prediction, answers, expected):
    assert vqa.accuracy(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    "prediction, half, uncut",
    [
        ("The Coca", 0.0, 4 / 9),  # distance 5 of 9
        ("CocaCola", 8 / 9, 8 / 9),
        (" Coca   cola\n", 1.0, 1.0),
        ("Cola", 0.0, 4 / 9),
        ("Coca", 0.0, 4 / 9),
        ("xyz", 0.0, 0.0),
    ],
)
def test_anls(prediction, half, uncut):
    answers = ["Coca Cola", "Coca Cola Company"]
    assert text.anls(prediction, answers) == pytest.approx(half)
    assert text.anls(prediction, answers, threshold=None) == pytest.approx(uncut)
    assert official.anls(prediction, answers) == pytest.approx(uncut)


def test_anls_cuts_at_the_threshold_itself():
    assert text.anls("ab", ["abcd"]) == 0.0  # distance 0.5
    assert text.anls("abc", ["abcd"]) == 0.75
    assert text.anls("", [""]) == 1.0 and text.anls("", ["a"]) == 0.0


@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
    ],
)
def test_levenshtein(a, b, distance):
    assert text.levenshtein(a, b) == distance


@pytest.mark.parametrize(
    "prediction, letter",
    [
        ("B", "B"), ("b", "B"), (" B.", "B"), ("(C) the liver", "C"), ("D: a lung", "D"),
        ("B\nBecause of it", "B"), ("A\nBecause of it", "A"),
        ("The correct answer is (C).", "C"), ("Answer: D", "D"), ("I choose C.", "C"),
        ("a lung", "A"),  # the text of the option
        ("The Liver.", "C"),
        ("Answer unknown", None), ("A picture of a foot", None), ("", None), ("E", None),
        ("Both are possible", None), ("D'accord", None),
    ],
)  # fmt: skip
def test_option_letter(prediction, letter):
    options = [" A:A lung", " B: a heart", "C:the liver", "D:none of these"]
    assert text.option_letter(prediction, options) == letter


def test_by_type():
    found = text.by_type([1, 0, 1, 1], ["count", "count", "count", "area"])
    assert found == (0.75, (1 + 2 / 3) / 2, {"area": 1.0, "count": 2 / 3}, {"area": 1, "count": 3})
    with pytest.raises(ValueError, match="2 values for 1 types"):
        text.by_type([1, 0], ["count"])


def test_official_oddities():
    assert official.option_letter("Answer: A and A", "A") == 3
    assert official.option_letter("B", "A") == 0
    assert official.option_letter("F", "F") == 0
    assert official.vqa("Yes", ["yes", "no"], ["maybe", "yes"]) == 0.0
    assert official.vqa("NO", ["yes", "no"], ["maybe", "yes"]) == 1.0
    assert official.exact_match("Yes", "yes") == 1.0
    assert official.exact_match("Yes ", "yes") == 0.0 and text.exact_match("Yes ", "yes")


def fake_judge(right):
    return lingo_judge.Judge("fake", lambda q, r, p: 0.9 if (r, p) in right else 0.1)


def test_the_judge_takes_the_best_reference_in_lower_case():
    judge = fake_judge({("1", "yes, one")})
    assert judge.right("Any?", ["None", " 1 "], "Yes, one\n")
    assert not judge.right("Any?", ["None"], "Yes, one")
    with pytest.raises(ValueError, match="'Any\\?' has no reference"):
        judge.score("Any?", [], "Yes")


def test_the_official_judge_counts_a_question_once_and_keeps_case():
    judge = fake_judge({("One", "Yes"), ("Red", "Red")})
    rows = (["q1", "q1", "q2"], ["n?"] * 3, ["None", "One", "Blue"], ["Yes", "Yes", "Red"])
    assert official.lingo_judge(judge, *rows) == {"q1": 1.0, "q2": 0.0}


def test_the_fallback_says_that_it_is_one(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="Lingo-Judge cannot be loaded from .*fallback=True"
    ):
        lingo_judge.load(tmp_path)
    judge = lingo_judge.load(tmp_path, fallback=True)
    assert judge.is_fallback and "NOT Lingo-Judge" in judge.name
    assert judge.score("?", ["a red car"], "the red car") == pytest.approx(2 / 3)
    assert judge.right("?", ["one"], "one") and not judge.right("?", ["one"], "")


def test_the_classifier_runs_in_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "question",
        "answer",
        "student",
        ":",
        "one",
        "two",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=128, num_labels=1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.classifier.bias.data += 3.0
    model.save_pretrained(tmp_path)
    judge = lingo_judge.load(tmp_path)
    assert not judge.is_fallback and judge.name == str(tmp_path)
    inputs = tokenizer("[CLS]\nQuestion: one\nAnswer: two\nStudent: one", return_tensors="pt")
    expected = torch.sigmoid(model(**inputs).logits).item()
    assert judge.probability("one", "two", "one") == pytest.approx(expected, abs=1e-6)
    assert judge.right("one", ["two"], "one")
    assert judge.score("one", ["two"], "one " * 500) > 0.5  # cut, not an error


def question(answer, *answers, choices=(), confidence=(), id="", text="?"):
    options = tuple("ABCD") if choices else tuple(dict.fromkeys((answer, *answers)))
    return VqaQuestion(
        "open", text, answer, options,
        id=id, text=text, answers=(answer, *answers), confidence=confidence, choices=choices,
    )  # fmt: skip


CASES = {
    "docvqa": (["Cola"], [question("Coca Cola")], [0.0], [4 / 9]),
    "pmc_vqa": (
        ["Answer: A", "the liver"],
        [
            question("A", choices=tuple("wxyz")),
            question("B", choices=("x", "B:The liver", "y", "z")),
        ],
        [1.0, 1.0],
        [2.0, 0.0],
    ),
    "rsvqa_hr": (["Yes "], [question("yes")], [1.0], [0.0]),
    "vqav2": (
        ["red", "red"],
        [
            question("red", *["blue"] * 9, confidence=("yes",) * 10),
            question("red", "red", *["blue"] * 8, confidence=("no",) * 10),
        ],
        [0.3, 0.6],
        [1.0, 0.0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_standard_and_official_side_by_side(name):
    predictions, questions, standard, expected = CASES[name]
    np.testing.assert_allclose(datasets.score(name, predictions, questions), standard)
    found = datasets.score(name, predictions, questions, compat="official")
    np.testing.assert_allclose(found, expected)


def test_lingoqa_rows_and_questions():
    rows = [question("One", id="q1"), question("None", id="q1"), question("Red", id="q2")]
    judge = fake_judge({("one", "one"), ("One", "One"), ("red", "red")})
    said = ["One", "one", "Red"]
    np.testing.assert_array_equal(datasets.score("lingoqa", said, rows, judge=judge), [1, 1, 1])
    found = datasets.score("lingoqa", said, rows, judge=judge, compat="official")
    np.testing.assert_array_equal(found, [1, 0])
    assert datasets.name("lingoqa", judge=judge, compat="official") == "fake, any row of a question"
    fallback = lingo_judge.load("nowhere", fallback=True)
    assert "NOT Lingo-Judge" in datasets.name("lingoqa", judge=fallback)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("coco", ["a"], [question("a")]), "unknown data set 'coco'; known are lingoqa, docvqa"),
        (("docvqa", ["a"], []), "1 predictions for 0 questions of docvqa"),
        (("lingoqa", ["a"], [question("a")]), "pass judge=lingo_judge.load"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.score(*arguments)
    with pytest.raises(ValueError, match="neither None nor 'official'"):
        datasets.score("docvqa", ["a"], [question("a")], compat="paper")
    with pytest.raises(ValueError, match="needs people's answers"):
        vqa.accuracy("a", [])
    with pytest.raises(ValueError, match="needs at least one answer"):
        text.anls("a", [])
