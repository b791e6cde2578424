"""What edits do to answers, against `score` and `generate`, which read them in another way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import directions, intervals, steering
from tests.helpers import tiny

QUESTIONS = ["what is shown ?", "which one is in the picture ?", "is it a cat ?"]
ANSWERS = ["a cat", "red", "no it is not a dog"]
STRENGTHS = (0.0, 0.5, 3.0)


@pytest.fixture(scope="module")
def processor(tiny_model):
    return tiny.processor(tiny_model.config)


@pytest.fixture(scope="module")
def pictures():
    return [tiny.picture(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def batch(processor, pictures):
    """Three examples and a row that fills up the batch."""
    return processor(pictures, QUESTIONS, answers=ANSWERS, rows=4, length=32)


@pytest.fixture(scope="module")
def prompts(processor, pictures):
    return processor(pictures, QUESTIONS, rows=4, length=32)


@pytest.fixture(scope="module")
def direction():
    vectors = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    return directions.Direction(S.lm.resid_post, (1,), vectors, where="image|generating")


@pytest.fixture(scope="module")
def curve(tiny_model, batch, direction):
    return steering.curve(tiny_model, direction, STRENGTHS, {"effect": batch}, draws=2, seed=5)


def test_likelihoods_are_those_that_score_gives_each_answer(tiny_model, prompts, direction, curve):
    found = curve.answers["effect"]
    assert found.log_likelihood.shape == found.chosen.shape == (3, 3, 3)
    every = [direction, direction.random_like(5), direction.random_like(6)]
    for draw, strength in ((0, 1), (0, 2), (2, 2)):
        edit = every[draw].edit(STRENGTHS[strength])
        want = mj.score(tiny_model, prompts, [[answer] for answer in ANSWERS], edit)[:3, 0]
        np.testing.assert_allclose(found.log_likelihood[draw, strength], want, atol=1e-4)


def test_without_strength_every_direction_is_the_clean_model(tiny_model, batch, prompts, curve):
    clean = mj.score(tiny_model, prompts, [[answer] for answer in ANSWERS])[:3, 0]
    found = curve.answers["effect"].log_likelihood
    np.testing.assert_allclose(found[:, 0], np.broadcast_to(clean, (3, 3)), atol=1e-5)
    np.testing.assert_allclose(steering.log_likelihood(tiny_model, batch)[:3], clean, atol=1e-5)
    assert np.abs(found[:, 2] - clean).max() > 0.1
    assert np.abs(found[0, 2] - found[1, 2]).max() > 0.1


@pytest.mark.slow
def test_an_answer_is_chosen_if_greedy_decoding_gives_it(
    tiny_model, processor, pictures, prompts, direction
):
    edits = [direction.edit(strength) for strength in STRENGTHS]
    said = mj.generate(tiny_model, prompts, edits[2], max_new_tokens=3)
    ids = np.asarray(said.tokens)
    batch = processor(pictures, QUESTIONS, answers=["a a a"] * 3, rows=4, length=32)
    new, labels = np.array(batch.ids), np.array(batch.labels)
    for row in range(3):  # what was generated in place of the answer, whose end is left out
        new[row, labels[row, :3]] = ids[row]
    assert (labels[:3, :3] >= 0).all()
    labels[:, 3:] = -1
    batch = batch.replace(ids=new, labels=labels)
    found = steering.measure(tiny_model, batch, edits)
    assert found.chosen[2].all() and found.tokens.tolist() == [3, 3, 3]
    assert not found.chosen[0].all()
    np.testing.assert_array_equal(found.accuracy.value, found.chosen.mean(-1))


def test_perplexity_is_by_token_with_an_interval_over_examples():
    likelihood = np.array([[[-2.0, -1.0, -6.0]], [[-1.0, -1.0, -1.0]]])
    found = steering.Answers(likelihood, likelihood > -3, np.array([2, 1, 3]))
    np.testing.assert_allclose(found.perplexity.value, np.exp([[9 / 6], [3 / 6]]))
    drawn = intervals.draws(3)
    rates = (drawn @ [2.0, 1.0, 6.0]) / (drawn @ [2, 1, 3])
    ends = np.exp(np.quantile(rates, [0.025, 0.975]))
    np.testing.assert_allclose([found.perplexity.low[0, 0], found.perplexity.high[0, 0]], ends)
    np.testing.assert_allclose(found.log_probability.value, [[-3.0], [-1.0]])
    np.testing.assert_allclose(found.accuracy.value, [[2 / 3], [1.0]])


def test_all_strengths_directions_and_batches_are_one_program(
    tiny_model, processor, pictures, direction, curve
):
    before = mj.compiles()
    other = processor(pictures[::-1], QUESTIONS[::-1], answers=ANSWERS[::-1], rows=4, length=32)
    again = steering.curve(
        tiny_model, direction.random_like(9), [0.0, -1.0, 2.0], {"damage": other}, draws=2
    )
    assert mj.compiles() == before
    first = curve.answers["effect"].log_likelihood[0, 0]
    second = again.answers["damage"].log_likelihood[0, 0]
    np.testing.assert_allclose(second, first[::-1], atol=1e-5)


@pytest.mark.slow
def test_the_slope_of_the_likelihood_is_its_finite_difference(tiny_model, batch, direction):
    def total(strength):
        return steering.log_likelihood(tiny_model, batch, direction.edit(strength)).sum()

    slope = jax.grad(total)(jnp.float32(0.5))
    step = 1e-2
    difference = (total(jnp.float32(0.5 + step)) - total(jnp.float32(0.5 - step))) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=2e-2)


def test_what_cannot_be_measured_is_refused(tiny_model, prompts, batch, direction):
    with pytest.raises(ValueError, match="no answers|no answer token"):
        steering.measure(tiny_model, prompts, [direction.edit()])
    with pytest.raises(ValueError, match="computes no logits to edit"):
        steering.measure(tiny_model, batch, [mj.add(S.logits, 1.0, where=tok.last)])
