"""A model in bfloat16 learns as one in float32 does: what trains is float32 until the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mllm_jax.training import edits, fit, losses, parts
from tests.helpers import lesson

STEPS, RATE = 80, 2e-5  # the paper's rate


@pytest.fixture(scope="module")
def narrow(model):
    return cast(model, jnp.bfloat16)


@pytest.fixture(scope="module")
def exact(narrow):
    """The same weights in float32."""
    return cast(narrow, jnp.float32)


def cast(model, dtype):
    return jax.tree.map(lambda a: a.astype(dtype), model)


@pytest.fixture(scope="module")
def batch(processor, features):
    """All of the lesson: the loss of a step is that of all data."""
    return processor.pack(None, lesson.TURNS, features=features, length=40)


@pytest.fixture(scope="module")
def masks():
    rng = np.random.default_rng(0)
    return {name: rng.random((2, 48)) < 0.3 for name in ("gate", "up", "down")}


@jax.jit
def nll(model, batch):
    total, count = losses.answer_nll(model, batch)
    return total.sum() / count.sum()


@pytest.mark.slow
@pytest.mark.parametrize("part", parts.PARTS)
def test_the_loss_falls_as_far_as_in_float32(part, exact, narrow, batch, masks):
    """By the curve, and by what comes out in the model's own dtype."""
    recipe = fit.Recipe(part=part, rate=RATE)
    neurons, batch = masks if part == "neurons" else None, batch.replace(processor=None)
    falls = []
    for model in (exact, narrow):
        after, curve = fit.fit(model, [batch] * STEPS, recipe, neurons=neurons)
        before = jax.tree.leaves(model)
        for was, is_ in zip(before, jax.tree.leaves(after), strict=True):
            assert is_.dtype == was.dtype
        falls.append((curve[0] - curve[-1], nll(model, batch) - nll(after, batch)))
    want, got = np.asarray(falls)
    assert (want > 0.01).all()  # of a loss of 4.5, the same at each look
    assert (got / want > 0.8).all() and (got / want < 1.25).all(), got / want


def distance(model, batch, *, remat):
    """Quickly compiled: how far weights are from 1."""
    kernel = model.projector.linears[0].kernel[...]
    return (kernel.astype(jnp.float32) - 1).mean(keepdims=True) ** 2, jnp.ones(1)


class Killed(BaseException):
    pass


class Until(list):
    def __getitem__(self, step):
        if step == 7:
            raise Killed
        return super().__getitem__(step)


def test_a_killed_run_goes_on_in_float32(narrow, exact, batches, tmp_path):
    """Weights between two of bfloat16 are kept: what comes out is what float32 gives, rounded."""
    size = float(np.abs(np.asarray(narrow.projector.linears[0].kernel[...], np.float32)).mean())
    recipe = fit.Recipe(rate=size * 2**-9 / 3, warmup=0, every=3)
    want, whole = fit.fit(narrow, batches, recipe, loss=distance)
    with pytest.raises(Killed):
        fit.fit(narrow, Until(batches), recipe, loss=distance, save=tmp_path)
    got, curve = fit.fit(narrow, batches, recipe, loss=distance, save=tmp_path)
    np.testing.assert_array_equal(curve, whole)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    wide = cast(fit.fit(exact, batches, recipe, loss=distance)[0], jnp.bfloat16)
    before, got, want = (m.projector.linears[0].kernel[...] for m in (narrow, got, wide))
    assert (before != got).mean() > 0.2 and (got == want).mean() > 0.95


def test_what_trains_is_float32(narrow, masks):
    for part in ("projector+lora", "lm", "neurons"):
        split = parts.partition(narrow, part, neurons=masks if part == "neurons" else None)
        state = fit.Recipe(part=part).optimiser(9).init(split.trained)
        for leaf in jax.tree.leaves((split.trained, state)):
            assert leaf.dtype in (jnp.float32, jnp.int32)
        merged = split.merge(split.trained, split.frozen)
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(narrow), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_step_is_one_however_few_there_are(exact, batches):
    """Of one step, or of one of warm-up, something changes."""
    for warmup in (0.0, 0.03, 1.0):
        recipe = fit.Recipe(rate=0.1, warmup=warmup)
        after, _ = fit.fit(exact, batches[:1], recipe, loss=distance)
        kernels = [np.asarray(m.projector.linears[0].kernel[...]) for m in (exact, after)]
        np.testing.assert_allclose(np.abs(kernels[1] - kernels[0]), 0.1, rtol=1e-3)


@pytest.mark.parametrize(
    ("warmup", "steps", "want"),
    [
        (0, 1, [2.0]),
        (1, 1, [2.0]),
        (0, 4, [2.0, 1.707, 1.0, 0.293]),
        (2, 4, [1.0, 2.0, 2.0, 1.0]),
        (4, 4, [0.5, 1.0, 1.5, 2.0]),
    ],
)
def test_no_step_has_a_rate_of_zero(warmup, steps, want):
    rate = fit.schedule(2.0, warmup, steps)
    np.testing.assert_allclose([rate(jnp.int32(i)) for i in range(steps)], want, atol=1e-3)


def test_without_answers_it_is_said(exact, batches):
    blind = [batch.replace(labels=None) for batch in batches[:2]]
    with pytest.raises(
        ValueError, match=r"^this batch has no answers to learn: .*answers="
    ) as said:
        fit.fit(exact, blind, fit.Recipe())
    assert "\n" not in str(said.value)


def test_an_edit_learns_in_float32(narrow, batches):
    """From parameters in bfloat16: steps far below their digits add up."""

    def loss(params, model, batch, key):
        assert params.dtype == jnp.float32
        return params.sum()

    start = jnp.ones(3, jnp.bfloat16)
    end, _ = edits.learn(loss, start, narrow, batches[:10], optax.sgd(1e-4))
    np.testing.assert_allclose(end, 1 - 10e-4, rtol=1e-6)
