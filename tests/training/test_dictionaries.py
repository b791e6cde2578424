"""Trained dictionaries: their first loss by a loop, planted directions, and killed trainings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax.analysis import fidelity
from mllm_jax.training import dictionaries
from mllm_jax.training.dictionaries import Recipe

D, PLANTED, ACTIVE, ROWS = 24, 40, 3, 256


def draw(rng, directions, mean, rows=ROWS):
    """Vectors that are sums of a few of the directions, around a mean."""
    values = np.zeros((rows, len(directions)))
    for row in values:
        row[rng.choice(len(directions), ACTIVE, replace=False)] = rng.uniform(40, 80, ACTIVE)
    return (mean + values @ directions).astype(np.float32)


@pytest.fixture(scope="module")
def planted():
    """The directions, forty batches eight times over, and vectors that are held out."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((PLANTED, D))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mean = 60 * rng.standard_normal(D)
    batches = [draw(rng, directions, mean) for _ in range(40)]
    return directions, batches * 8, draw(rng, directions, mean, 2000)


def first_loss(batch, recipe):
    """The share of variance that is not explained by a dictionary as it starts, by loops."""
    wide = batch.astype(np.float64)
    x = wide - wide.mean(0)
    x /= np.sqrt((x**2).mean())
    decoder = np.random.default_rng(recipe.seed).standard_normal((recipe.latents, x.shape[1]))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    pre = x @ decoder.T
    latents = np.zeros_like(pre)
    if recipe.kind == "batch_topk":
        least = sorted(pre.ravel())[-recipe.k * len(x)]
        latents = np.where(pre >= least, pre, 0)
    for own, of in zip(pre, latents):
        if recipe.kind == "topk":
            for i in sorted(range(len(own)), key=lambda i: -own[i])[: recipe.k]:
                of[i] = max(own[i], 0)
        if recipe.kind == "jumprelu":
            of[:] = [value if value > dictionaries.START_THRESHOLD else 0 for value in own]
    return ((x - latents @ decoder) ** 2).mean(), (latents > 0).sum(1).mean()


KINDS = ["topk", *(pytest.param(k, marks=pytest.mark.slow) for k in ("batch_topk", "jumprelu"))]


@pytest.mark.parametrize("kind", KINDS)
def test_planted_directions_are_found(kind, planted, tmp_path):
    directions, batches, held_out = planted
    recipe = Recipe(latents=64, k=ACTIVE, kind=kind, rate=1e-2, dead_after=2000)
    fitted = dictionaries.fit(batches, recipe)
    loss, active = first_loss(batches[0], recipe)
    np.testing.assert_allclose(fitted.unexplained[0], loss, rtol=1e-4)
    np.testing.assert_allclose(fitted.active[0], active, rtol=1e-4)
    assert fitted.unexplained.shape == (320,) and fitted.dead[0] == 0
    dictionary = fitted.dictionary
    np.testing.assert_allclose(np.linalg.norm(dictionary.decoder, axis=1), 1, atol=1e-5)
    cosine = directions @ dictionary.decoder.T
    assert cosine.max(1).min() > 0.9
    measured = fidelity.measure(dictionary, [held_out])
    assert measured.explained > 0.9 and measured.active_per_token < ACTIVE + 1
    # What the last steps saw is what the dictionary does with vectors as they are.
    assert abs(1 - measured.explained - fitted.unexplained[-8:].mean()) < 0.02
    assert abs(measured.active_per_token - fitted.active[-8:].mean()) < 0.3
    mj.write_dictionary(dictionary, tmp_path)
    again = mj.load_dictionary(tmp_path)
    np.testing.assert_allclose(
        again.encode(held_out), dictionary.encode(held_out), rtol=0, atol=2e-3
    )


def test_a_dictionary_reads_vectors_as_they_are():
    """Its latents are those of the vectors less their mean, in the unit of the vectors."""
    rng = np.random.default_rng(3)
    weights = dictionaries._Weights(
        *(rng.standard_normal(s).astype(np.float32) for s in ((D, 9), 9, (9, D), D, 9))
    )
    units = dictionaries._Units(50 * rng.standard_normal(D), 7.0)
    x = (units.mean + 7 * rng.standard_normal((20, D))).astype(np.float32)
    own = (x - units.mean) / 7 - weights.decoder_bias
    pre = own @ weights.encoder + weights.encoder_bias
    limits = {"topk": 0, "batch_topk": 0.5, "jumprelu": np.exp(weights.log_threshold)}
    for kind, limit in limits.items():
        recipe = Recipe(latents=9, k=9, kind=kind)
        made = dictionaries._dictionary(weights, 0.5, units, recipe)
        latents = np.where(pre > limit, np.maximum(pre, 0), 0)
        np.testing.assert_allclose(made.encode(x), 7 * latents, rtol=1e-4, atol=1e-3)
        y = 7 * (latents @ weights.decoder + weights.decoder_bias) + units.mean
        np.testing.assert_allclose(made.reconstruct(x), y, rtol=1e-4, atol=1e-3)


class Killed(BaseException):
    pass


class Dies:
    """The batches, until one of them is asked for."""

    def __init__(self, batches, at):
        self.batches, self.at = batches, at

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        if number == self.at:
            raise Killed
        return self.batches[number]


def leaves(fitted):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(fitted)]


def test_a_killed_training_ends_with_the_same_bytes(planted, tmp_path):
    _, batches, _ = planted
    recipe = Recipe(latents=64, k=ACTIVE, kind="topk", rate=1e-2, dead_after=500, every=8)
    few = batches[:30]
    whole = dictionaries.fit(few, recipe)
    assert whole.dead[20:].max() > 0  # what is dead is counted on
    for at in (5, 19, 29):
        with pytest.raises(Killed):
            dictionaries.fit(Dies(few, at), recipe, save=tmp_path)
    assert leaves(dictionaries.fit(few, recipe, save=tmp_path)) == leaves(whole)
    assert leaves(dictionaries.fit(few, recipe, save=tmp_path)) == leaves(whole)  # is finished
    often = dataclasses.replace(recipe, every=3)
    assert leaves(dictionaries.fit(few, often, save=tmp_path)) == leaves(whole)
    other = dataclasses.replace(recipe, seed=1)
    with pytest.raises(ValueError, match=r"was made for something else: it differs in settings"):
        dictionaries.fit(few, other, save=tmp_path)
    with pytest.raises(ValueError, match=r"differs in data"):
        dictionaries.fit([few[1], *few[1:]], recipe, save=tmp_path)


def test_dead_latents_reconstruct_what_is_left_over(planted):
    """The auxiliary loss of Gao et al. 2024, section A.2, by loops."""
    _, batches, _ = planted
    recipe = Recipe(latents=64, k=ACTIVE, kind="topk", rate=1e-2, dead_after=2000)
    state = dictionaries._start(recipe, D)
    x = dictionaries._Units.of(batches[0]).remove(batches[0])
    dead = np.arange(64) < 32
    rng = np.random.default_rng(2)
    left = rng.standard_normal((ROWS, D)).astype(np.float32)
    pre = (x @ np.asarray(state.weights.encoder)).astype(np.float32)
    found = dictionaries._auxiliary(
        jnp.asarray(pre), jnp.asarray(dead), jnp.asarray(left), state.weights.decoder
    )
    guess = np.zeros((ROWS, D))
    for row in range(ROWS):
        for i in sorted(range(32), key=lambda i: -pre[row, i])[: D // 2]:
            guess[row] += max(pre[row, i], 0) * np.asarray(state.weights.decoder[i], np.float64)
    want = ((left - guess) ** 2).mean() / (left.astype(np.float64) ** 2).mean()
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_thresholds_have_straight_through_gradients():
    """Of Rajamanoharan et al. 2024b, equations 11 and 12, with a rectangle as kernel."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((50, 3))).astype(np.float32)
    threshold, by = np.array([0.4, 0.9, 1.3], np.float32), rng.standard_normal((50, 3))
    width = dictionaries.BANDWIDTH
    near = np.abs(x - threshold) < width / 2
    assert near.any(0).all()
    for of, over in ((dictionaries._jump, threshold), (dictionaries._step_above, 1)):
        value, back = jax.vjp(of, x, threshold)
        to_x, to_threshold = back(jnp.asarray(by, jnp.float32))
        above = x > threshold
        np.testing.assert_array_equal(value, np.where(above, x if over is threshold else 1, 0))
        np.testing.assert_allclose(to_x, np.where(above & (over is threshold), by, 0), atol=1e-6)
        want = -(over / width * near * by).sum(0)
        np.testing.assert_allclose(to_threshold, want, rtol=1e-4)


@pytest.mark.parametrize("axis", [-1, None])
def test_a_rank_is_that_of_a_sort(axis):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 40)).astype(np.float32)
    x[:, 3] = x[:, 5]  # equal values
    x *= 10.0 ** rng.integers(-20, 20, x.shape)
    for count in (1, 2, 7):
        found = np.asarray(dictionaries.largest(jnp.asarray(x), count, axis=axis))
        rows = x if axis else x.reshape(1, -1)
        want = [sorted(value for value in row if value > 0)[-count] for row in rows]
        np.testing.assert_array_equal(found.ravel(), np.array(want, np.float32))
    few = np.where(np.arange(40) < 3, np.abs(x), -1)
    least = dictionaries.largest(jnp.asarray(few), 1000, axis=axis)
    assert (np.asarray(least) < 1e-30).all()  # fewer are above 0: all of them are kept


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "gated"}, "kind='gated' is not one of topk, batch_topk, jumprelu"),
        ({"k": 65}, "k=65 is not a whole number from 1 to 64"),
        ({"k": 0}, "k=0 is not a whole number from 1"),
        ({"latents": 2.5}, "latents=2.5 is not a whole number"),
        ({"rate": float("nan")}, "rate=nan is not a finite number"),
        ({"warmup": 2}, "warmup=2 is not a finite number from 0 to 1"),
        ({"auxiliary": -1}, "auxiliary=-1 is not a finite number"),
    ],
)
def test_a_wrong_recipe_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**{"latents": 64, "k": 3} | fields)


def test_wrong_vectors_are_refused(planted):
    _, batches, _ = planted
    recipe = Recipe(latents=64, k=ACTIVE, kind="topk", rate=1e-2, dead_after=2000)
    with pytest.raises(ValueError, match="there is no batch of vectors"):
        dictionaries.fit([], recipe)
    with pytest.raises(ValueError, match=r"a batch of vectors is \[3, 4, 5\], expected \[n, D\]"):
        dictionaries.fit([np.zeros((3, 4, 5))], recipe)
    with pytest.raises(ValueError, match=r"a batch of vectors is \[0, 24\], expected"):
        dictionaries.fit([np.zeros((0, D))], recipe)
    for wrong in (np.ones((4, D)), np.full((4, D), np.nan)):
        with pytest.raises(ValueError, match="all equal, or not finite"):
            dictionaries.fit([wrong], recipe)
    with pytest.raises(ValueError, match=r"batch 1 is \[9, 24\], the first is \[256, 24\]"):
        dictionaries.fit([batches[0], batches[1][:9]], recipe)
    damaged = np.where(np.arange(D) == 2, np.inf, batches[1]).astype(np.float32)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is"):
        dictionaries.fit([batches[0], damaged], recipe)
