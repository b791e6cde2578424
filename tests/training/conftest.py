"""A tiny lesson, see `lesson`; pictures are known by their vision features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mllm_jax.families.llava import model as llava
from tests.helpers import lesson, tiny


@pytest.fixture(scope="package")
def model(tiny_config, random_model):
    """Of two LM layers."""
    lm = dataclasses.replace(tiny_config.lm, layers=2)
    return random_model(llava.LlavaConfig.of(tiny_config.vision, lm, fold=2, image_token=95))


@pytest.fixture(scope="package")
def processor(model):
    return tiny.processor(model.config)


@pytest.fixture(scope="package")
def features():
    return np.random.default_rng(0).normal(size=(4, 16, 32)).astype(np.float32)


@pytest.fixture(scope="package")
def batches(processor, features):
    """Two pictures a step, in turn."""
    both = [
        processor.pack(None, lesson.TURNS[i : i + 2], features=features[i : i + 2], length=40)
        for i in (0, 2)
    ]
    return [both[step % 2] for step in range(lesson.STEPS)]


@pytest.fixture(autouse=True, scope="module")
def _quick_to_compile(quick_to_compile):
    """Compile every program of this folder quickly."""
