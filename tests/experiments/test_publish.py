"""A finished study is published: its results without pictures, its figures, marked tables."""

from __future__ import annotations

import json

import pytest

from experiments.publish import documents
from mllm_jax.report import report

RESULTS = {"study": "projection", "format": report.FORMAT}
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
    results = RESULTS | {"claims": [CLAIM], "pictures": [{"id": "one"}]}
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


def test_an_unfinished_run_is_refused(repository, run):
    (run / "manifest.json").unlink()  # which is written last
    with pytest.raises(ValueError, match="is no finished study"):
        documents.publish(run, repository)
    assert not (repository / "docs/results/projection.json").exists()


def test_a_run_without_its_figures_is_refused_before_anything_is_written(repository, run):
    (run / "figures/overview.png").unlink()
    with pytest.raises(FileNotFoundError, match="overview.png is missing; start the study again"):
        documents.publish(run, repository)
    assert not (repository / "docs/results/projection.json").exists()


def test_another_study_is_refused(repository, run):
    (run / "results.json").write_text(json.dumps(RESULTS | {"study": "sweep"}))
    with pytest.raises(ValueError, match="'sweep' is not published"):
        documents.publish(run, repository)
