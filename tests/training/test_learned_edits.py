"""Learned edits find what was planted in a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.training import edits

ROWS = 8
PLANTED = np.array([[0, 5], [0, 30], [1, 7], [2, 2], [2, 41], [3, 11]])  # layer, neuron


@pytest.fixture(scope="module")
def batches(make_batch):
    """Text alone, one shape, each another."""
    return [make_batch(images=(0,) * ROWS, words=(6,) * ROWS, seed=seed) for seed in range(160)]


def clean(model, batch):
    return jax.nn.log_softmax(mj.run(model, batch).logits)


def distance(wanted, got):
    """Mean KL divergence, nats."""
    return jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(got)), -1).mean()


@pytest.mark.parametrize("name", ["hard_concrete", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_a_mask_keeps_the_neurons_that_matter(name, tiny_config, random_model, batches):
    """All other neurons have no way down."""
    model, gate = random_model(tiny_config), edits.GATES[name]
    kernel = model.lm.layers.mlp.down.kernel
    planted = np.zeros((4, 48), bool)
    planted[tuple(PLANTED.T)] = True
    kernel[...] = jnp.where(planted[..., None], 4 * kernel[...], 0)

    def loss(logits, model, batch, key):
        out = mj.run(model, batch, mj.scale(S.lm.mlp.act, gate.draw(logits, key)))
        return distance(clean(model, batch), out.logits) + 0.1 * gate.cost(logits).mean()

    start = jnp.full((4, 48), 1.0)
    logits, curve = edits.learn(loss, start, model, batches, optax.adam(0.1))
    kept = np.asarray(gate.final(logits)) > 0.5
    np.testing.assert_array_equal(np.argwhere(kept), PLANTED)
    assert curve[-10:].mean() < curve[:10].mean()


def test_a_subspace_that_the_answer_is_read_from_is_found(tiny_config, random_model, batches):
    """The head sees two directions of the residual; a patch of them alone must swap answers."""
    model, rng = random_model(tiny_config), np.random.default_rng(0)
    planted, _ = np.linalg.qr(rng.normal(size=(32, 2)))
    model.lm.norm.scale[...] = jnp.ones(32)
    model.lm.head.kernel[...] = jnp.asarray(2 * planted @ rng.normal(size=(2, 96)), jnp.float32)
    half = ROWS // 2
    base, source = np.arange(half), np.arange(half) + half

    def loss(basis, model, batch, key):
        edit = mj.patch(S.lm.resid_post[-1], source, base, where=tok.last, basis=basis)
        return distance(clean(model, batch)[source], mj.run(model, batch, edit).logits[base])

    start = rng.normal(size=(32, 2)).astype(np.float32)
    assert edits.alignment(start, planted)[-1] < 0.5
    basis, curve = edits.learn(loss, start, model, batches, optax.adam(0.1))
    assert edits.alignment(basis, planted)[-1] > 0.95
    assert curve[-8:].mean() < 0.1 * curve[:8].mean()


def test_hard_concrete_gates_are_those_of_the_paper():
    """Closed, open and between as often as the distribution function of equation 10 says."""
    logits = np.array([-2.0, 0.0, 1.5], np.float32)
    keys = jax.random.split(jax.random.key(0), 20000)
    gates = np.asarray(
        jax.vmap(lambda key: edits.HARD_CONCRETE.draw(jnp.asarray(logits), key))(keys)
    )

    def below(x):  # P(stretched gate < x), before it is clipped
        share = (x + 0.1) / 1.2
        return 1 / (1 + np.exp(logits - 2 / 3 * np.log(share / (1 - share))))

    np.testing.assert_allclose((gates == 0).mean(0), below(0.0), atol=0.01)
    np.testing.assert_allclose((gates == 1).mean(0), 1 - below(1.0), atol=0.01)
    np.testing.assert_allclose((gates < 0.3).mean(0), below(0.3), atol=0.01)
    np.testing.assert_allclose(edits.HARD_CONCRETE.cost(logits), 1 - below(0.0), rtol=1e-5)
    np.testing.assert_array_equal(edits.HARD_CONCRETE.final(np.array([-9.0, 9.0])), [0, 1])


def test_a_loss_that_is_no_number_is_said(tiny_model, batches):
    with pytest.raises(
        FloatingPointError, match="gates: the loss of step 0 is nan; lower the lear"
    ):
        edits.learn(
            lambda p, *_: p * jnp.nan, 1.0, None, batches[:1], optax.sgd(1.0), label="gates"
        )


def test_alignment_is_of_subspaces_not_of_columns():
    a = np.eye(6)[:, :2]
    np.testing.assert_allclose(edits.alignment(a @ [[1, 2], [3, -4]], a), 1)
    tilted = np.stack([np.eye(6)[0], np.cos(1) * np.eye(6)[1] + np.sin(1) * np.eye(6)[3]], 1)
    np.testing.assert_allclose(edits.alignment(a, tilted), [1, np.cos(1)])
