"""Published results: the numbers of the documents are theirs, and the verdicts follow from them."""

from __future__ import annotations

import json
import pathlib

import pytest

from experiments.domain_neurons import claims
from experiments.publish import documents

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "docs/results").glob("*.json"))
}


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_tables_are_those_of_the_results(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    marked = {mark["study"] for mark in documents.MARK.finditer(text)}
    assert "domain_neurons" in marked and marked <= set(RESULTS)
    assert documents.with_tables(text, RESULTS) == text


def test_the_verdicts_follow_from_the_results():
    results = RESULTS["domain_neurons"]
    assert claims.judge(results) == results["claims"]
    assert len(results["claims"]) == 4


def test_the_study_is_the_full_one():
    results = RESULTS["domain_neurons"]
    assert {score["n"] for score in results["baseline"].values()} == {60}
    draws = {row["control"]: row["draws"] for row in results["effects"]}
    assert draws["rate"] >= 10
