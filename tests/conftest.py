"""Fixtures for all tests: a tiny LLaVA with random weights, batches for it, quick compilation."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import pathlib
import tempfile

# Programs of tests are tiny: compiling them takes longer than running them, and takes a quarter of
# the time without these two. XLA aborts on flags that it does not know, as those of jaxlib 0.11.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = " ".join([
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ])  # fmt: skip

# Programs that one worker or process of this run compiled and another needs. Workers inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _compiled.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import hypothesis
import jax
import pytest

from mllm_jax.families.llava import model as llava
from tests.helpers import random_inputs

hypothesis.settings.register_profile("tests", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("tests")


# Imported modules and collected tests stay until the end: searching them for cycles again and again
# takes a twelfth of all time.
gc.disable()


def pytest_collection_finish():
    """Leave what was imported and collected out of garbage collection, which starts here."""
    gc.freeze()
    gc.enable()


_quick = False  # whether the programs in memory are those of `quick_to_compile`


@pytest.fixture(autouse=True, scope="module")
def _drop_programs(request):
    """Drop compiled programs where they would be wrong, or too many; the cache on disk has them.

    A module runs no program of another that was optimized otherwise: its rounding differs. Beyond
    the memory maps that Linux allows (65,530), a process ends by a segmentation fault.
    """
    global _quick
    before, _quick = _quick, "quick_to_compile" in request.fixturenames
    maps = pathlib.Path("/proc/self/maps")
    if _quick != before or (maps.exists() and maps.read_bytes().count(b"\n") > 20_000):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_config() -> llava.LlavaConfig:
    """Return a config of 3 vision layers, 16 patches, fold 2, 4 LM layers and 96 words."""
    return random_inputs.TINY


@pytest.fixture(scope="session")
def tiny_model() -> llava.Llava:
    """Return a model of `tiny_config` with random weights."""
    return random_inputs.random_model(random_inputs.TINY)


@pytest.fixture(scope="session")
def make_batch():
    """Return `random_inputs.make_batch`."""
    return random_inputs.make_batch


@pytest.fixture(scope="session")
def random_model():
    """Return `random_inputs.random_model`."""
    return random_inputs.random_model


@pytest.fixture(scope="module")
def quick_to_compile():
    """Leave out XLA's optimizations: a tiny program takes longer to compile than to run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def op_by_op(quick_to_compile):
    """Compile no program as a whole: scans, loops and conditions run as Python does.

    Every operation is still compiled for its shapes, so these tests share one model and one shape
    of batches (`tests.helpers.shared_fixtures`).
    """
    with jax.disable_jit():
        yield
