"""The verdicts on the paper's claims follow from the results, and from what they could tell."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from experiments.domain_neurons import claims
from tests.helpers import fake_study

RESULTS = fake_study.fake_results()


def verdict(number: int, change) -> dict:
    results = copy.deepcopy(RESULTS)
    change(results)
    return claims.judge(results)[number]


@pytest.mark.parametrize(
    ("counts", "says"), [((5, 1, 9), "holds"), ((5, 0, 9), "fails"), ((None,) * 3, "undecided")]
)
def test_neurons_beyond_chance_in_every_module(counts, says):
    def change(results):
        for test, count in zip(results["stability"].values(), counts, strict=True):
            test["beyond_chance"] = count

    assert verdict(0, change)["verdict"] == says


def test_neurons_that_were_given_are_not_tested():
    found = verdict(0, lambda results: results.update(stability={}))
    assert found["verdict"] == "undecided" and "not tested" in found["found"]


EFFECT, NONE, OPEN = ("effect", 0.2), ("none within the margin", 0.01), ("undecided", 0.1)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ((EFFECT,) * 5, "holds"),
        ((EFFECT,) * 4 + (NONE,), "holds"),  # one may miss
        ((EFFECT,) * 3 + (OPEN,) * 2, "undecided"),
        ((EFFECT,) * 3 + (NONE,) * 2, "fails"),
        ((EFFECT,) * 3 + (("effect", -0.2),) * 2, "fails"),
        ((OPEN,) * 5, "undecided"),
        (((None, 0.2),) * 5, "undecided"),  # a single draw
    ],
)
def test_hidden_states_move_farther_than_with_matched_neurons(rows, says):
    def change(results):
        of = [
            row for row in results["effects"]
            if (row["control"], row["measure"], row["module"]) == ("rate", "relative_l2", "all")
        ]  # fmt: skip
        for row, (found, difference) in zip(of, rows, strict=True):
            row.update(verdict=found, difference=difference, low=difference, high=difference)

    assert verdict(1, change)["verdict"] == says


@pytest.mark.parametrize(
    ("interval", "questions", "says"),
    [
        ((-0.08, 0.02), 240, "holds"),
        ((0.0, 0.0), 8, "undecided"),  # no answer changed, of too few
        ((-0.12, 0.02), 240, "undecided"),
        ((-0.3, -0.11), 240, "fails"),
        ((-0.625, -0.125), 8, "undecided"),  # three of eight answers
        ((-1.0, -0.5), 8, "fails"),  # six of them
    ],
)
def test_accuracy_within_ten_points(interval, questions, says):
    def change(results):
        for row in results["ablation"]:
            row.update(low=-0.01, high=0.01, difference=0.0)
            if row["data"] == "medical":
                row.update(low=interval[0], high=interval[1], difference=np.mean(interval))
        for row in results["baseline"].values():
            row.update(n=questions)

    found = verdict(2, change)
    assert found["verdict"] == says
    assert ("changes of 97 points" in found["power"]) == (questions == 8)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ({"verdict": "three stages as claimed (flat, falling, rising)", "claimed": True}, "holds"),
        ({"verdict": "three segments, not the claimed stages", "claimed": False}, "fails"),
        ({"boundaries": None, "verdict": "undecided: two segments fit"}, "undecided"),
    ],
)
def test_three_stages(stages, says):
    assert verdict(3, lambda results: results["stages"]["all"].update(stages))["verdict"] == says


def test_nothing_was_measured():
    found = claims.judge(RESULTS | {"effects": [], "ablation": [], "baseline": {}})
    assert [row["verdict"] for row in found[1:3]] == ["undecided"] * 2
