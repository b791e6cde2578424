"""What is installed: the library and its data, and no study."""

from __future__ import annotations

import ast
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import mllm_jax as mj

ROOT = pathlib.Path(__file__).parents[1]


def test_public_names_are_imported_when_they_are_read():
    code = "import sys, mllm_jax; assert not {'jax', 'numpy'} & set(sys.modules); print('light')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "light\n", done.stderr
    assert set(mj.__all__) == {*mj._MODULE_OF, "sites", "tokens", "__version__"}
    assert set(mj.__all__) <= set(dir(mj))
    tree = ast.parse((ROOT / "mllm_jax/__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for block in tree.body if isinstance(block, ast.If)
        for node in block.body if isinstance(node, ast.ImportFrom) and node.module != "mllm_jax"
        for alias in node.names
    }  # fmt: skip
    assert typed == mj._MODULE_OF  # what a type checker reads
    for name in mj.__all__:
        assert getattr(mj, name) is not None


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    """Return the names of the files in a built wheel."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("package")
    for folder in ("mllm_jax", "experiments", "benchmarks", "tests/helpers"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir=dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (copy / "dist").iterdir()
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_contains_the_library_alone(names):
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"mllm_jax"}


def test_the_wheel_contains_every_module_and_the_data(names):
    files = (ROOT / "mllm_jax").rglob("*")
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "mllm_jax/py.typed" in expected
    assert expected - names == set()
