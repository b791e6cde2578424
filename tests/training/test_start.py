"""A projector that starts at the scale of words."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mllm_jax import families
from mllm_jax.interventions.tap import Taps
from mllm_jax.models import projector
from mllm_jax.training import start


def test_features_come_in_standardised_and_words_come_out(tiny_config, random_model):
    model = random_model(tiny_config)
    for linear in model.projector.linears:  # as they are when nothing is trained yet
        linear.bias[...] = 0 * linear.bias[...]
    before = jax.tree.map(np.asarray, model)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(8, 16, 32)) * rng.uniform(0.1, 9, 32) + rng.normal(size=32)
    features = features.astype(np.float32)
    after = start.scale_projector(model, features, gain=3.0)
    out = after.projector(features, Taps().module("projector"))
    words = np.std(np.asarray(after.lm.embed[...]))
    np.testing.assert_allclose(np.std(np.asarray(out)), 3 * words, rtol=1e-4)

    flat = np.asarray(projector.fold(features, 2)).reshape(-1, 128).astype(np.float64)
    first = after.projector.linears[0]
    standard = (flat - flat.mean(0)) / flat.std(0)
    want = standard @ np.asarray(before.projector.linears[0].kernel[...])
    got = flat @ np.asarray(first.kernel[...]) + np.asarray(first.bias[...])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "mistral3", "paligemma"])
def test_any_projector_says_words_whatever_stands_in_padding(family, random_model):
    """Mergers with norms and without biases; and the mean of a single linear map goes too."""
    config = families.FAMILIES[family].config.tiny()
    rng = np.random.default_rng(0)
    features = rng.normal(3, rng.uniform(0.1, 9, config.vision.width), (4, 16, config.vision.width))
    features = features.astype(np.float32)
    is_patch = np.ones((4, 16), bool)
    is_patch[1] = False
    results = []
    for padding in (0, 1e6):
        model = random_model(config)
        for linear in model.projector.linears:
            if config.projector.bias:
                linear.bias[...] = 0 * linear.bias[...]
        padded = np.where(is_patch[..., None], features, np.float32(padding))
        model = start.scale_projector(model, padded, is_patch, gain=3.0)
        out = model.projector(features[is_patch.all(1)], Taps().module("projector"))
        results.append(np.asarray(out))
        words = np.std(np.asarray(model.lm.embed[...]))
        np.testing.assert_allclose(np.std(results[-1]), 3 * words, rtol=1e-3)
    np.testing.assert_array_equal(*results)
    if config.projector.depth == 1 and config.projector.bias:
        mean = results[0].reshape(-1, results[0].shape[-1]).mean(0)
        assert abs(mean).max() < 0.02 * np.std(results[0])
