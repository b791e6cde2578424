"""Most of these tests run op by op: nothing is compiled as a whole, which is what takes the time.

`jax.disable_jit` runs scans, loops and conditions as Python does; the code of the taps is the same.
Every operation is still compiled for its shape, so all these tests share one model and one shape of
batches: 8 rows of 15 tokens, 9 pictures.
"""

from __future__ import annotations

import dataclasses

import jax
import oracle
import pytest

from mllm_jax.families.llava import model as llava


@pytest.fixture(scope="module")
def quick_to_compile():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def op_by_op(quick_to_compile):
    with jax.disable_jit():
        yield


@pytest.fixture(scope="package")
def model(tiny_config, random_model):
    """The tiny model with one layer of vision and three of language."""
    vision = dataclasses.replace(tiny_config.vision, layers=2)
    lm = dataclasses.replace(tiny_config.lm, layers=3)
    return random_model(llava.LlavaConfig.of(vision, lm, fold=2, image_token=95))


@pytest.fixture(scope="package")
def pictures(make_batch):
    """One picture a row, rows of two lengths, and a picture that is nobody's."""
    return make_batch(images=(1,) * 8, words=(11, 8) * 4, fill=1)


@pytest.fixture(scope="package")
def mixed(make_batch):
    """Two pictures in the first row, none in the second."""
    images = (2, 0, 1, 1, 1, 1, 1, 1)
    return make_batch(images=images, words=(7, 12, 8, 11, 8, 11, 8, 11), fill=1)


@pytest.fixture(scope="package")
def batch(pictures, model):
    """`pictures` with vision features: the tower is not run."""
    with jax.disable_jit():
        return pictures.replace(features=model.features(pictures, oracle.Plain()))
