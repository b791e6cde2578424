"""Vision features are computed once, also when the run is killed."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from mllm_jax.data import features
from mllm_jax.interventions.tap import Taps
from tests import tiny


@pytest.fixture(scope="module")
def examples():
    return [types.SimpleNamespace(image=tiny.picture(i)) for i in range(5)]


class Killed(BaseException):
    pass


def test_features_are_those_of_the_tower(tiny_model, examples, tmp_path):
    processor = tiny.processor(tiny_model.config)
    path = tmp_path / "deep" / "features.npy"

    def read(some):
        return features.vision_features(tiny_model, processor, some, path, batch_size=2)

    class Until(list):
        def __getitem__(self, i):
            if i == 3:
                raise Killed
            return super().__getitem__(i)

    with pytest.raises(Killed):
        read(Until(examples))
    assert np.load(path).any((1, 2)).tolist() == [True, True, False, False, False]

    class After(list):
        def __getitem__(self, i):
            assert i >= 2, "done already"
            return super().__getitem__(i)

    found = read(After(examples))
    batch = processor([e.image for e in examples], ["<image>"] * 5)
    batch = batch.replace(processor=None)
    want = jax.jit(lambda model, batch: model.features(batch, Taps()))(tiny_model, batch)
    assert found.shape == (5, 16, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(read([None] * 5), found)
