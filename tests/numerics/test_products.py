"""The choice of products is asked for once, and not where others have asked."""

from __future__ import annotations

import subprocess
import sys

import jaxlib
import pytest

from mllm_jax.numerics import products

EIGEN = "--xla_cpu_experimental_ynn_fusion_type="
PRODUCTS = f"{EIGEN}LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


@pytest.fixture
def flags(monkeypatch):
    def after(before: str | None, choose=products.prefer_eigen) -> str | None:
        if before is None:
            monkeypatch.delenv("XLA_FLAGS", raising=False)
        else:
            monkeypatch.setenv("XLA_FLAGS", before)
        for _ in range(2):
            choose()
        return products.os.environ.get("XLA_FLAGS")

    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2")
    return after


def test_flags(flags, monkeypatch):
    assert flags(None) == EIGEN
    assert flags("--xla_a=1") == f"--xla_a=1 {EIGEN}"
    assert flags(None, products.avoid_reductions) == PRODUCTS
    assert flags(f"{PRODUCTS} --xla_a=1") == f"--xla_a=1 {EIGEN}"  # after `import mllm_jax`
    assert flags(EIGEN, products.avoid_reductions) == EIGEN
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


def test_sums_that_lanes_share_are_right():
    """The pullback of an RMSNorm by many cotangents at once, as vmapped gradients compute it."""
    code = """
import mllm_jax, jax, numpy as np, jax.numpy as jnp
rng = np.random.default_rng(0)
x, slopes = rng.normal(size=(2, 9, 32)), rng.normal(size=(256, 2, 9, 32)).astype(np.float32)
norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
_, pull = jax.vjp(norm, x.astype(np.float32))
got = jax.jit(jax.vmap(lambda slope: pull(slope)[0]))(slopes)
scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
want = scale * slopes - scale**3 * x * (x * slopes).mean(-1, keepdims=True)
assert np.abs(got - want).max() < 1e-4, np.abs(got - want).max()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
