"""Most of these tests run op by op: nothing is compiled as a whole, which is what takes the time.

`jax.disable_jit` runs scans, loops and conditions as Python does; the code of the taps is the same.
"""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="module")
def op_by_op():
    with jax.disable_jit():
        yield


@pytest.fixture(scope="module")
def quick_to_compile():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
