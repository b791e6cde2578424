"""These programs run for a moment: compiling them is what takes the time."""

from __future__ import annotations

import cases
import jax
import pytest


@pytest.fixture(params=cases.CASES.values(), ids=cases.CASES, scope="session")
def edits(request):
    return request.param


@pytest.fixture(autouse=True, scope="package")
def _quick_to_compile():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
