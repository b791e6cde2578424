"""The smallest effects that tests can find."""

import itertools

import numpy as np
import pytest

from mllm_jax.analysis import intervals, power


def test_the_examples_of_the_documentation():
    assert power.answers(questions=60, tests=100).possible == pytest.approx(0.20)
    assert power.answers(questions=60, tests=100).likely == pytest.approx(0.238, abs=0.001)
    assert power.answers(questions=8, tests=25) == (None, None)
    assert intervals.holm([intervals.sign_flip(np.ones(8)), *[1.0] * 24])[0] == pytest.approx(
        0.195, abs=0.001
    )


@pytest.mark.parametrize(
    ("questions", "tests"), [*itertools.product([6, 8, 15, 60], [1, 5, 20, 100])]
)
def test_possible_is_the_least_number_of_changes_that_the_test_finds(questions, tests):
    changes = [-np.ones(m).astype(float) for m in range(1, questions + 1)]
    found = [
        m
        for m, changed in enumerate(changes, 1)
        if intervals.holm([intervals.sign_flip(changed), *[1.0] * (tests - 1)])[0] <= 0.05
    ]
    expected = found[0] / questions if found else None
    assert power.answers(questions, tests).possible == expected


@pytest.mark.parametrize(("questions", "tests"), [(20, 5), (60, 20), (60, 100), (240, 80)])
def test_likely_effect_is_found_as_often_as_told(questions, tests):
    rng = np.random.default_rng(0)
    likely = power.answers(questions, tests).likely
    found = 0
    for _ in range(600):
        changes = -(rng.random(questions) < likely).astype(float)
        p = intervals.holm([intervals.sign_flip(changes), *[1.0] * (tests - 1)])[0]
        found += p <= 0.05
    assert found / 600 == pytest.approx(0.8, rel=0.1)


@pytest.mark.parametrize(("degrees", "tests"), [(4, 1), (9, 5), (60, 20)])
def test_likely_difference_is_found_as_often_as_told(degrees, tests):
    """By t tests on samples of normal numbers, whose true error is known."""
    rng = np.random.default_rng(0)
    size = degrees + 1
    error = 1 / np.sqrt(size)
    likely = power.difference(error, degrees, tests).likely
    samples = rng.normal(likely, 1, (4000, size))
    t = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / np.sqrt(size))
    possible = power.difference(error, degrees, tests).possible / error
    assert (t > possible).mean() == pytest.approx(0.8, rel=0.05)
    assert power.difference(2 * error, degrees, tests).likely == pytest.approx(2 * likely)


def test_more_questions_find_smaller_effects_and_more_tests_larger_ones():
    for n in (20, 40, 80):
        few, many = power.answers(n, 5), power.answers(n, 100)
        assert few.possible < few.likely and few.likely < many.likely
    assert power.answers(80, 5).likely < power.answers(40, 5).likely


@pytest.mark.parametrize("fields", [{"tests": 0}, {"tests": 5, "level": 0}])
def test_errors(fields):
    with pytest.raises(ValueError, match="tests="):
        power.changed_answers(**fields)
