"""A finished study is published: its results without pictures, its figures, marked tables."""

from __future__ import annotations

import json

import pytest

from experiments.publish import documents

CLAIM = {"claim": "It holds.", "criterion": "c", "found": "f", "verdict": "holds", "power": "p"}
TEXT = """# Results

<!-- projection: verdicts -->

| old | table |
|---|---|
| 1 | 2 |

Afterwards.

<!-- domain_neurons: claims -->

| kept |
|------|

<!-- projection: claims -->
"""


@pytest.fixture
def repository(tmp_path):
    """A repository whose two documents have a mark of each study."""
    for document in documents.DOCUMENTS:
        path = tmp_path / document
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    for name in documents.FIGURES["projection"]:
        (folder / f"figures/{name}.png").write_bytes(b"a figure")
    results = {"format": 2, "study": "projection", "claims": [CLAIM], "pictures": [{"id": "one"}]}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text("{}")
    return folder


def test_tables_figures_and_results_are_written(repository, run):
    documents.publish(run, repository)
    text = (repository / "README.md").read_text()
    assert "| claim     | verdict |\n|-----------|---------|\n| It holds. | ✓ holds |\n" in text
    assert "| 1 | 2 |" not in text and "\n\nAfterwards.\n" in text and "| kept |" in text
    assert text.count("| It holds. | ") == 2
    folder = repository / "docs/results"
    published = json.loads((folder / "projection.json").read_text())
    assert published["claims"] == [CLAIM] and "pictures" not in published
    assert (folder / "projection-overview.png").read_bytes() == b"a figure"


def test_publishing_twice_changes_nothing(repository, run):
    documents.publish(run, repository)
    once = [(repository / document).read_bytes() for document in documents.DOCUMENTS]
    documents.publish(run, repository)
    assert [(repository / document).read_bytes() for document in documents.DOCUMENTS] == once


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("results.json", None, "is not a finished study: it has no results.json"),
        ("manifest.json", None, "is not a finished study: it has no manifest.json"),
        ("results.json", '{"format": 2, "stu', "results.json is damaged"),
        ("results.json", '{"format": 1, "study": "projection"}', "format 1, this version reads 2"),
        ("results.json", '{"format": 2, "study": "projection"}', "claims"),
        ("figures/overview.png", None, "overview.png"),
    ],
)
def test_what_is_not_whole_is_refused_and_nothing_is_written(repository, run, file, content, says):
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=says):
        documents.publish(run, repository)
    assert not (repository / "docs/results/projection.json").exists()
    assert all((repository / document).read_text() == TEXT for document in documents.DOCUMENTS)


def test_another_study_is_refused(repository, run):
    (run / "results.json").write_text(json.dumps({"format": 2, "study": "sweep"}))
    with pytest.raises(ValueError, match="'sweep' is not published"):
        documents.publish(run, repository)
