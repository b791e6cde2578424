"""These programs run for a moment: compiling them is what takes the time."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def _quick_to_compile():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
