"""Prompts of the projection study, answers read as classes, and classes that are scored."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax.data import batching, domains, tasks
from mllm_jax.data.embedded import recipe
from mllm_jax.evaluation import answers
from mllm_jax.interventions.tap import Taps
from tests.helpers import tiny

CLASSES = ("cat", "dog", "ship tree star")


def example(number: int, label: str) -> domains.Example:
    encoded = recipe.jpeg(tiny.picture(number))
    return domains.Example(f"e{number}", "things", label, encoded, ())


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    made = [example(number, CLASSES[number % 3]) for number in range(30)]
    return tasks.Task.from_domain(
        domains.Domain("things", "all", made), classes=CLASSES, topic="things"
    )


class TestPrompts:
    def test_the_papers(self, task):
        asked = answers.question(task, task.test[0])
        head, tail = (
            "Classify this image into one of the following categories relating to things: ",
            ". Only output a single final classification label and NOTHING ELSE.",
        )
        assert asked.prompt.startswith(head) and asked.prompt.endswith(tail)
        listed = asked.prompt[len(head) : -len(tail)].split(", ")
        assert sorted(listed) == sorted(CLASSES)
        assert asked.answer == task.test[0].label and asked.options == CLASSES
        released = answers.question(task, task.test[0], wording="released").prompt
        quoted = ", ".join(f'"{name}"' for name in listed)
        assert released == f"{head}{quoted}{tail}\n\nOutput:"

    def test_plain_is_the_picture_and_the_label(self, task):
        asked = answers.question(task, task.test[0], wording="plain")
        assert asked.prompt == "<image>" and asked.answer == f"{task.test[0].label}\n"
        assert [option.strip() for option in asked.options] == list(CLASSES)

    def test_orders_are_seeded_and_differ(self, task):
        def orders(**how):
            return [answers.question(task, shown, **how).prompt for shown in task.train]

        assert orders() == orders()
        assert len(set(orders())) > 3  # of six
        assert orders() != orders(seed=1) and orders() != orders(epoch=1)

    def test_an_unknown_wording_is_refused(self, task):
        with pytest.raises(ValueError, match="unknown wording 'chat'; known are paper, released"):
            answers.question(task, task.test[0], wording="chat")


NAMES = ("apple leaf", "apple leaf rust", "Spider_mites", "a corn leaf", "Bell pepper")


@pytest.mark.parametrize(
    ("said", "wanted", "how"),
    [
        ("apple leaf", 0, "exact"),
        ("  apple leaf\n", 0, "exact"),
        ("Spider_mites", 2, "exact"),
        ("Apple Leaf.", 0, "normalised"),
        ('"An apple leaf"', 0, "normalised"),
        ("spider mites", 2, "normalised"),
        ("Corn leaf", 3, "normalised"),
        ("The image shows an apple leaf.", 0, "named"),
        ("Label: Apple leaf rust (severe)", 1, "named"),
        ("This is an apple leaf rust, not a healthy apple leaf", -1, "none"),
        ("apple leaf, corn leaf", -1, "none"),
        ("pineapple leafage", -1, "none"),
        ("appel leaf rust", 1, "nearest"),
        ("Bell peper", 4, "nearest"),
        ("spider", -1, "none"),
        ("", -1, "none"),
        ("I cannot tell.", -1, "none"),
    ],
)
def test_parse(said, wanted, how):
    assert answers.parse(said, NAMES) == (wanted, how)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("", -1), ("...", -1), ("The", -1), ("a", 0), ("A.", 0), ("(B)", 1), ("+", 3), ("++", -1)],
)
def test_an_answer_without_words_names_no_class(said, wanted):
    assert answers.parse(said, ("A", "B", "C", "+")).id == wanted
    assert answers.parse(said, ("A", "B")).id == (wanted if wanted < 2 else -1)


def test_nearest_needs_one_that_is_near_enough():
    assert answers.parse("appel leaf rust", NAMES, nearest=0.95) == (-1, "none")
    assert answers.parse("leaf x", ("leaf a1", "leaf b1")) == (-1, "none")
    assert answers.parse("leaf ab", ("leaf a1", "leaf 1b")).how == "none"  # as near to both


def test_classes_that_read_alike_are_told_apart_by_the_letter_alone():
    same = ("Leaf_spot", "leaf spot")
    assert answers.parse("leaf spot", same) == (1, "exact")
    assert answers.parse("a LEAF spot", same) == (-1, "none")


def test_read_and_rules():
    said = ["apple leaf", "Bell peper", "no", "Corn leaf!"]
    got = answers.parse_answers(said, NAMES)
    assert got.dtype == np.int32 and got.tolist() == [0, 4, -1, 3]
    assert answers.rules(said, NAMES) == {
        "exact": 1, "normalised": 1, "named": 0, "nearest": 1, "none": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def batches(task, tiny_config) -> batching.QuestionBatches:
    """Five questions, two in a batch."""
    processor = tiny.processor(tiny_config)
    pairs = [(shown, answers.question(task, shown)) for shown in list(task.test)[:5]]
    return batching.QuestionBatches(processor, pairs, 2, batching.row_length(processor, pairs))


def test_scores_are_those_of_mj_score(batches, tiny_model):
    got = answers.score_classes(tiny_model, batches)
    assert got.shape == (5, 3) and got.dtype == np.float32
    for number in range(len(batches)):
        want = mj.score(tiny_model, batches[number], list(CLASSES))
        rows = len(batches.rows(number))
        np.testing.assert_array_equal(got[2 * number :][:rows], np.asarray(want)[:rows])
    lengths = [len(batches.processor.answer_ids(name)) for name in CLASSES]
    assert lengths == [2, 2, 4]
    each = answers.score_classes(tiny_model, batches, per="token")
    np.testing.assert_allclose(each, got / np.array(lengths), rtol=1e-6)


def test_scores_without_the_end_of_turn(batches, tiny_model):
    ids = [batches.processor.answer_ids(name, end=False) for name in CLASSES]
    candidates = np.full((2, 3, 4), -1, np.int32)
    for c, said in enumerate(ids):
        candidates[:, c, : len(said)] = said
    want = np.asarray(mj.score(tiny_model, batches[0], candidates))
    got = answers.score_classes(tiny_model, batches, end=False)
    np.testing.assert_array_equal(got[:2], want)
    assert (got > answers.score_classes(tiny_model, batches)).all()


def test_features_give_the_scores_of_their_pictures(batches, tiny_model):
    """Vision features that were computed before stand in for the pictures."""
    seen = [batches.processor([shown.image], ["what"]) for shown, _ in batches.pairs]
    features = np.concatenate(
        [np.asarray(tiny_model.features(batch.replace(processor=None), Taps())) for batch in seen]
    )
    given = batching.QuestionBatches(batches.processor, batches.pairs, 2, batches.length, features)
    assert given[0].pixels.size == 0
    np.testing.assert_allclose(
        answers.score_classes(tiny_model, given),
        answers.score_classes(tiny_model, batches),
        atol=1e-5,
    )


def test_free_answers_are_those_of_mj_generate(batches, tiny_model):
    said = answers.generate_answers(tiny_model, batches, max_new_tokens=3)
    want = mj.generate(tiny_model, batches[2], max_new_tokens=3, stop=True).text[0]
    assert len(said) == 5 and said[4] == want
    key = jax.random.key(0)
    warm = [answers.generate_answers(tiny_model, batches, max_new_tokens=3, temperature=5.0, key=key)
            for _ in range(2)]  # fmt: skip
    assert warm[0] == warm[1] != said


def test_what_is_wrong_is_said(batches, tiny_model, task):
    with pytest.raises(ValueError, match="per='word' is not one of answer, token"):
        answers.score_classes(tiny_model, batches, per="word")
    other = answers.question(task, task.test[0], wording="plain")
    mixed = batching.QuestionBatches(
        batches.processor, [batches.pairs[0], (task.test[0], other)], 2
    )
    with pytest.raises(ValueError, match="2 lists of classes"):
        answers.score_classes(tiny_model, mixed)
