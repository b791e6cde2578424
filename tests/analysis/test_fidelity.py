"""What a dictionary explains and what the model loses by it, against loops in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mllm_jax.analysis import fidelity
from mllm_jax.dictionaries.dictionary import Dictionary

D, M = 6, 10


@pytest.fixture(scope="module")
def dictionary():
    rng = np.random.default_rng(0)
    made = {
        "encoder": (D, M), "encoder_bias": (M,), "decoder": (M, D), "decoder_bias": (D,),
    }  # fmt: skip
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in made.items()}
    weights["encoder_bias"][4] = -100  # never active
    return Dictionary(**weights)


def test_measures_are_those_of_a_loop(dictionary):
    vectors = 50 + np.random.default_rng(1).standard_normal((23, D)).astype(np.float32)
    error, active = 0.0, np.zeros(M, int)
    for x in vectors.astype(np.float64):
        z = np.maximum(x @ dictionary.encoder + dictionary.encoder_bias, 0)
        error += ((x - z @ dictionary.decoder - dictionary.decoder_bias) ** 2).sum()
        active += z > 0
    mean = vectors.astype(np.float64).mean(0)
    variance = sum(((x - mean) ** 2).sum() for x in vectors.astype(np.float64))
    for sizes in ([23], [7, 7, 7, 2]):
        chunks = np.split(vectors, np.cumsum(sizes)[:-1])
        found = fidelity.measure(dictionary, chunks)
        assert found.tokens == 23
        np.testing.assert_array_equal(found.active, active)
        assert found.explained == pytest.approx(1 - error / variance, rel=1e-5)
        assert found.active_per_token == pytest.approx(active.sum() / 23)
        assert found.dead == (active == 0).mean() > 0
    assert np.isnan(fidelity.measure(dictionary, [vectors[:1]]).explained)  # has no variance


def test_vectors_that_do_not_fit_are_refused(dictionary):
    with pytest.raises(ValueError, match="there is no vector"):
        fidelity.measure(dictionary, [])
    with pytest.raises(ValueError, match=r"vectors are \[3, 7\], expected \[n, 6\]"):
        fidelity.measure(dictionary, [np.zeros((3, 7), np.float32)])
    wide = dataclasses.replace(dictionary, decoder=np.zeros((M, 9), np.float32))
    with pytest.raises(ValueError, match="reads vectors of 6 and returns 9: it is a transcoder"):
        fidelity.measure(wide, [])
    skipping = dataclasses.replace(dictionary, skip=np.zeros((D, D), np.float32))
    with pytest.raises(ValueError, match="has a skip map: it is a transcoder"):
        fidelity.measure(skipping, [])


def test_the_share_of_the_loss_that_is_recovered():
    rng = np.random.default_rng(0)
    clean = rng.uniform(0, 1, 40)
    ablated = clean + rng.uniform(2, 4, 40)
    spliced = clean + 0.1 * (ablated - clean)
    found = fidelity.loss_recovered(clean, ablated, spliced)
    assert found.value == pytest.approx(0.9) and found.low == pytest.approx(0.9)
    noisy = fidelity.loss_recovered(clean, ablated, spliced + rng.normal(0, 1, 40))
    assert noisy.low < noisy.value < noisy.high < 1
    assert fidelity.loss_recovered(clean, ablated, clean).value == 1
    assert fidelity.loss_recovered(clean, ablated, ablated).value == 0
    assert fidelity.loss_recovered(clean, ablated, 2 * ablated).value < 0


def test_without_damage_there_is_nothing_to_recover():
    clean = np.array([1.0, 2.0, 3.0])
    for ablated in (clean, clean - 0.5):
        assert np.isnan(fidelity.loss_recovered(clean, ablated, clean)).all()
    # On the mean there is damage, and in some resamples there is none.
    found = fidelity.loss_recovered(clean, clean + [3, -1, -1], clean)
    assert found.value == 1 and np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (([1.0], [1.0, 2.0], [1.0]), "of the same examples"),
        (([], [], []), "of the same examples"),
        (([[1.0]], [[1.0]], [[1.0]]), "of the same examples"),
        (([1.0], [np.nan], [1.0]), r"ablated\[0\]"),
    ],
)
def test_wrong_losses_are_refused(losses, says):
    with pytest.raises(ValueError, match=says):
        fidelity.loss_recovered(*losses)
