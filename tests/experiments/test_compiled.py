"""Programs of a study are kept for its next start."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from experiments.running import compiled
compiled.keep(None if sys.argv[1] == "default" else sys.argv[1])
import jax, jax.numpy as jnp
print(jax.config.jax_compilation_cache_dir, float(jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(3))))
"""


def run(folder: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, folder], env=inherited | environment, check=True, text=True,
        capture_output=True, cwd=pathlib.Path(__file__).parents[2],
    ).stdout.split()[0]  # fmt: skip


def files(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.rglob("*-cache")}


def test_a_second_start_compiles_nothing(tmp_path):
    used = pathlib.Path(run("default", MLLM_JAX_CACHE=str(tmp_path)))
    assert used.is_relative_to(tmp_path / "compiled")
    first = files(tmp_path)
    assert first
    run("default", MLLM_JAX_CACHE=str(tmp_path))
    assert files(tmp_path) == first


@pytest.mark.parametrize(
    ("folder", "environment", "used"),
    [
        ("", {}, "None"),
        ("named", {}, "named"),
        ("default", {"JAX_COMPILATION_CACHE_DIR": "w"}, "w"),
    ],
)
def test_where(folder, environment, used, tmp_path):
    paths = {key: str(tmp_path / value) for key, value in environment.items()}
    named = str(tmp_path / folder) if folder == "named" else folder
    found = run(named, MLLM_JAX_CACHE=str(tmp_path), **paths)
    assert found in (used, str(tmp_path / used))
