"""Sweeps over layers from the command line, on a tiny model and folders of pictures."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

CONFIG = "configs/embedded_sweep.py"
SMALL = ("--config.pairs_per_domain=2", "--config.batch_size=2")


@pytest.fixture(scope="module")
def paths(folders, tmp_path_factory):
    """The domains with labels that begin with different letters: "circle", not "a circle"."""
    root = tmp_path_factory.mktemp("named")
    for folder in folders:
        for label in folder.iterdir():
            shutil.copytree(label, root / folder.name / label.name.removeprefix("a "))
    return f"--config.paths={tuple(str(root / folder.name) for folder in folders)}"


@pytest.mark.slow
@pytest.mark.parametrize("grid, columns", [("tokens", 4), ("strengths", 4)])
def test_leaves_a_grid_and_a_page(grid, columns, paths, command, execute, tmp_path):
    done = execute(command("sweep", f"{CONFIG}:{grid}", tmp_path / "work", *SMALL, paths, count=0))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert results["pairs"] == 6 and len(results["columns"]) == columns
    assert len(results["effect"]) == 9 and any(any(row) for row in results["effect"])
    if grid == "tokens":  # after the last layer nothing but the last token is read
        *others, last = (abs(effect) for effect in results["effect"][-1])
        assert max(others) < 1e-6 < 1e-5 < last
    rows = list(csv.DictReader((tmp_path / "work" / "grid.csv").open()))
    assert len(rows) == 9 * columns
    assert (tmp_path / "work" / "index.html").stat().st_size > 1000


def test_unknown_grid_is_named(command, execute, tmp_path):
    done = execute(command("sweep", f"{CONFIG}:rows", tmp_path / "work", *SMALL))
    assert done.returncode == 1 and "'rows' is not one of tokens" in done.stderr.splitlines()[-1]
