"""Published results: the numbers of the documents are theirs, and the verdicts follow from them."""

from __future__ import annotations

import json
import pathlib

import pytest

from experiments.domain_neurons import claims
from experiments.publish import documents
from mllm_jax.analysis import projection

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "docs/results").glob("*.json"))
}


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_tables_are_those_of_the_results(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    marked = {mark["study"] for mark in documents.MARK.finditer(text)}
    assert marked == set(RESULTS) == {"domain_neurons", "projection"}
    assert documents.with_tables(text, RESULTS) == text


def test_the_verdicts_follow_from_the_results():
    results = RESULTS["domain_neurons"]
    assert claims.judge(results) == results["claims"]
    assert len(results["claims"]) == 4


@pytest.mark.parametrize("claim", range(len(projection.CLAIMS)))
def test_the_verdicts_of_the_projection_study_follow_from_its_intervals(claim):
    stated, published = projection.CLAIMS[claim], RESULTS["projection"]["claims"][claim]
    assert published["claim"] == stated.text
    rows = published["comparisons"]
    if not rows:
        assert published["verdict"] == "undecided" and "not measured" in published["reason"]
        return
    for row in rows:
        beyond = row["low"] > 0 if stated.sign > 0 else row["high"] < 0
        assert (row["side"] == "supports") == beyond
    sides = [row["side"] for row in rows]
    holds = sides.count("supports") >= len(sides) - stated.misses
    fails = sides.count("contradicts") > stated.misses
    assert published["verdict"] == ("holds" if holds else "fails" if fails else "undecided")


def test_the_projection_study_is_the_full_one():
    results = RESULTS["projection"]
    assert set(results["tasks"]) == {"objects", "astronomy", "satellite", "documents"}
    assert all(task["train"] == 96 for task in results["tasks"].values())
    assert results["seeds"] == [0, 1, 2]


def test_the_study_is_the_full_one():
    results = RESULTS["domain_neurons"]
    assert {score["n"] for score in results["baseline"].values()} == {60}
    draws = {row["control"]: row["draws"] for row in results["effects"]}
    assert draws["rate"] >= 10
