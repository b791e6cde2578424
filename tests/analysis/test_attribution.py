"""Attributions of functions whose answer is known, and of a model's gates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.analysis import attribution

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 5)).astype(np.float32)


def both(metric, gates, steps=4):
    return (
        attribution.first_order(metric, gates),
        attribution.integrated(metric, gates, steps=steps),
    )


def test_of_a_linear_metric_both_are_exact():
    gates = RNG.normal(size=W.shape).astype(np.float32)
    for found in both(lambda g: jnp.sum(W * g) + 7, gates):
        np.testing.assert_allclose(found.values, W * gates, rtol=1e-5)
        np.testing.assert_allclose(found.metric, (W * gates).sum() + 7, rtol=1e-5)


def test_of_a_power_they_are_what_calculus_says():
    """Of g^3: 3 to first order; 1 integrated, to which the midpoint rule of n steps comes up
    to 1 / 4 n^2."""
    for steps in (1, 2, 16):
        first, whole = both(lambda g: jnp.sum(W * g**3), np.ones_like(W), steps)
        np.testing.assert_allclose(first.values, 3 * W, rtol=1e-5)
        np.testing.assert_allclose(whole.values, W * (1 - 1 / (4 * steps**2)), rtol=1e-5)


def test_gates_may_be_a_tree_and_all_of_it_jitted():
    def metric(gates):
        return jnp.prod(gates["a"]) * gates["b"].sum()

    gates = {"a": np.array([2.0, 3.0], np.float32), "b": np.ones((2, 2), np.float32)}
    found = jax.jit(lambda g: attribution.integrated(metric, g, steps=64))(gates)
    np.testing.assert_allclose(found.values["b"].sum() + found.values["a"].sum(), 24, rtol=1e-3)
    np.testing.assert_allclose(found.values["b"], 2, rtol=1e-3)  # 6 b t^2 from 0 to 1
    with pytest.raises(ValueError, match="steps=0: integrated gradients need one or more"):
        attribution.integrated(metric, gates, steps=0)


def test_in_a_model_they_are_complete_and_closed_gates_count_nothing(tiny_model, make_batch):
    batch = make_batch(images=(0, 0), words=(7, 5))
    gates = {"act": np.ones((4, 48), np.float32), "heads": np.ones((4, 4), np.float32)}
    gates["act"][1, ::2] = 0

    @jax.jit
    def metric(gates):
        edits = mj.scale(S.lm.mlp.act, gates["act"]) >> mj.scale(S.lm.attn.heads, gates["heads"])
        return jnp.sum(mj.run(tiny_model, batch, edits).logits[:, 3])

    found = attribution.integrated(metric, gates, steps=64)
    change = found.metric - metric(jax.tree.map(np.zeros_like, gates))
    total = sum(values.sum() for values in jax.tree.leaves(found.values))
    assert abs(change) > 0.1
    np.testing.assert_allclose(total, change, rtol=5e-3)
    assert not found.values["act"][1, ::2].any() and found.values["act"][1, 1::2].all()


def test_top_is_the_largest_in_order():
    values = np.array([[0.0, 3.0, -9.0], [3.0, 8.0, 1.0]])
    np.testing.assert_array_equal(attribution.top(values, 3), [[1, 1], [0, 1], [1, 0]])
    np.testing.assert_array_equal(attribution.top_mask(values, 2), [[0, 1, 0], [0, 1, 0]])
