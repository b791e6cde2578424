"""The code of every page of the documentation runs, from top to bottom, and its links lead to files.

Code is a block of Python, or our side of a table that sets lines of others beside ours.
"""

from __future__ import annotations

import gc
import pathlib
import re

import jax
import pytest

from tests.helpers import tiers

DOCS = pathlib.Path(__file__).parents[1] / "docs"
SITE = DOCS.with_name("mkdocs.yml")
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
QUICK = {"add_a_model.md", "official.md", "words.md"}  # the others run the embedded model
ELSEWHERE = {"pods.md"}  # it needs the compiler for TPUs


CODE = re.compile(
    r"```python\n(.*?)```|^\| their line \| our line \|\n((?:\|[^\n]*\n)+)", re.S | re.M
)


def blocks(page: str) -> list[str]:
    """The code of a page, in its order."""
    found = []
    for block, table in CODE.findall((DOCS / page).read_text(encoding="utf-8")):
        ours = [line.split(" | ")[-1] for line in table.splitlines()]
        found += [block] if block else re.findall(r"`([^`]+)`", " ".join(ours))
    return found


@pytest.fixture
def _release():
    """Release what a page made, a model of a gigabyte and its programs, before the next one."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.mark.usefixtures("_release")
@pytest.mark.parametrize(
    "page",
    tiers.slow_except(QUICK, [p for p in PAGES if blocks(p) and p not in ELSEWHERE]),
)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    if page not in QUICK:
        pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (DOCS / link).exists(), link


def test_every_page_is_in_the_contents():
    contents = (DOCS / "README.md").read_text(encoding="utf-8")
    assert {page for page in PAGES if f"({page})" in contents} == {*PAGES} - {"README.md"}


def test_every_page_is_on_the_site():
    assert {*re.findall(r": (\w+\.md)$", SITE.read_text(encoding="utf-8"), re.M)} == {*PAGES}


def test_the_coverage_of_the_papers_names_tests_and_files_that_exist():
    text = (DOCS / "coverage.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z]\d+) \| .+ \| (.+) \| (.+) \|$", text, re.M)
    assert len({row for row, *_ in rows}) == len(rows) == 67
    for row, places, shown in rows:
        for place in re.findall(r"`([^`]+)`", places):
            assert any((DOCS.parent / top / place).exists() for top in ("mllm_jax", ".")), place
        tests = re.findall(r"`([^`]+)::(test_\w+)`", shown)
        assert tests, row
        for file, test in tests:
            code = (DOCS.with_name("tests") / file).read_text(encoding="utf-8")
            assert f"def {test}(" in code, f"{row}: {file}::{test}"
