"""Questions made from labels."""

from __future__ import annotations

import collections

import pytest

from mllm_jax.data.embedded import questions

FAMILY = tuple(f"a thing {letter}" for letter in "abcdefg")


def test_every_style_is_asked_and_can_be_answered():
    asked = questions.questions_for("x", FAMILY[0], FAMILY, "a medical scan")
    assert [q.style for q in asked] == ["kind", "category", "yesno", "yesno", "choice"]
    assert [q.answer for q in asked] == ["a medical scan", FAMILY[0], "yes", "no", FAMILY[0]]
    for q in asked:
        assert q.answer in q.options
        assert len({*q.options}) == len(q.options) == (2 if q.style == "yesno" else 4)
    assert FAMILY[0] in asked[2].prompt
    assert FAMILY[0] not in asked[3].prompt
    assert all(option in asked[4].prompt for option in asked[4].options)


def test_questions_depend_on_the_key_alone():
    again = [questions.questions_for("x", FAMILY[0], family) for family in (FAMILY, FAMILY[::-1])]
    assert again[0] == again[1]
    assert again[0] != questions.questions_for("y", FAMILY[0], FAMILY)


def test_no_position_and_no_option_gives_the_answer_away():
    places, offered = collections.Counter(), collections.Counter()
    for number in range(700):
        answer = FAMILY[number % 7]
        options = questions.options_for(answer, FAMILY, f"key {number}")
        places[options.index(answer)] += 1
        offered.update(options)
    assert all(140 < count < 210 for count in places.values())  # 175 expected
    assert all(350 < count < 450 for count in offered.values())  # 400 expected


def test_a_small_family_has_fewer_options():
    asked = questions.questions_for("x", "a", ("a", "b"))
    assert [len(q.options) for q in asked] == [2, 2, 2, 2]
    assert [q.style for q in questions.questions_for("x", "a", ("a",))] == ["category"]


def test_an_answer_outside_its_options_is_refused():
    with pytest.raises(ValueError, match="'c' is not among its options"):
        questions.Question("choice", "a or b?", "c", ("a", "b"))
