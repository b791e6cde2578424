"""The notebooks of the documentation run, and store what they show."""

from __future__ import annotations

import pathlib

import pytest

from tests.helpers import notebooks

FOLDER = pathlib.Path(__file__).parents[1] / "docs/notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_what_it_stores(name, tmp_path, monkeypatch):
    notebook = notebooks.read(FOLDER / name)
    monkeypatch.chdir(tmp_path)
    got = [notebooks.kinds(outputs) for outputs in notebooks.run(notebook, name)]
    assert got == [notebooks.kinds(cell["outputs"]) for cell in notebooks.code_cells(notebook)]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_stores_its_outputs_and_opens_on_colab(name):
    notebook = notebooks.read(FOLDER / name)
    cells = notebooks.code_cells(notebook)
    assert "%pip install" in "".join(cells[0]["source"]) and notebook["nbformat"] == 4
    assert sum(bool(cell["outputs"]) for cell in cells) >= 4
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert "Traceback" not in text and "/tmp/" not in text and len(text) < 2**20


def test_there_are_three():
    assert NAMES == ["domain_neuron.ipynb", "first_hour.ipynb", "steering.ipynb"]
