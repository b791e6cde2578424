"""The choice of products is asked for once, and not where others have asked."""

from __future__ import annotations

import subprocess
import sys

import jaxlib
import pytest

from mllm_jax.numerics import products

EIGEN = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.fixture
def flags(monkeypatch):
    def after(before: str | None) -> str | None:
        if before is None:
            monkeypatch.delenv("XLA_FLAGS", raising=False)
        else:
            monkeypatch.setenv("XLA_FLAGS", before)
        products.prefer_eigen()
        products.prefer_eigen()
        return products.os.environ.get("XLA_FLAGS")

    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2")
    return after


def test_flags(flags, monkeypatch):
    assert flags(None) == EIGEN
    assert flags("--xla_a=1") == f"--xla_a=1 {EIGEN}"
    own = f"{EIGEN}LIBRARY_FUSION_TYPE_DOT"
    assert flags(own) == own
    monkeypatch.setattr(jaxlib, "__version__", "0.11.0")
    assert flags(None) is None
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2")
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert flags(None) is None


def test_this_xla_knows_it():
    code = (
        "from mllm_jax.numerics import products; products.prefer_eigen(); import jax, jax.numpy as jnp;"
        "x = jnp.ones((64, 64)); print(jax.jit(lambda x: x @ x).lower(x).compile().as_text())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ynn" not in done.stdout and " dot(" in done.stdout
