"""Fixtures of the tests of interventions and passes: one model and one shape of batches.

8 rows of 15 tokens, 9 pictures. A conftest imports them.
"""

from __future__ import annotations

import dataclasses

import jax
import pytest

from mllm_jax.families.llava import model as llava
from tests.helpers import oracle


@pytest.fixture(scope="session")
def model(tiny_config, random_model):
    """The tiny model with one layer of vision and three of language."""
    vision = dataclasses.replace(tiny_config.vision, layers=2)
    lm = dataclasses.replace(tiny_config.lm, layers=3)
    return random_model(llava.LlavaConfig.of(vision, lm, fold=2, image_token=95))


@pytest.fixture(scope="session")
def pictures(make_batch):
    """One picture a row, rows of two lengths, and a picture that is nobody's."""
    return make_batch(images=(1,) * 8, words=(11, 8) * 4, fill=1)


@pytest.fixture(scope="session")
def mixed(make_batch):
    """Two pictures in the first row, none in the second."""
    images = (2, 0, 1, 1, 1, 1, 1, 1)
    return make_batch(images=images, words=(7, 12, 8, 11, 8, 11, 8, 11), fill=1)


@pytest.fixture(scope="session")
def batch(pictures, model):
    """`pictures` with vision features: the tower is not run."""
    with jax.disable_jit():
        return pictures.replace(features=model.features(pictures, oracle.Plain()))
