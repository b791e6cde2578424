"""What surrounds cuDNN's attention is right: masks, lanes, derivatives and the choice of it.

Without a GPU, JAX's own implementation of the same function takes the place of cuDNN's.
"""

from __future__ import annotations

import itertools
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mllm_jax.models import attention, cudnn_attention
from mllm_jax.sharding import mesh
from tests.models.attention_loop import KINDS, assert_near, attend_in_a_loop, masks


@pytest.fixture
def stand_in(monkeypatch):
    """Compute on this platform what a GPU would leave to cuDNN; return the calls."""
    calls = []

    def on_cuda(*args, cuda, default):
        calls.append(args[0].shape)
        return cuda(*args)

    monkeypatch.setattr(cudnn_attention, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn_attention, "supports", lambda query, softcap: softcap is None)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_cuda)
    return calls


def inputs(kind: str, heads: tuple[int, int], B: int, T: int, seed: int):
    rng, (N, K) = np.random.default_rng(seed), heads
    query, weight = rng.normal(size=(2, B, T, N, 8)).astype(np.float32)
    key, value = rng.normal(size=(2, B, K, T, 8)).astype(np.float32)
    return (query, key, value), masks(kind, rng, B, N, T, T), weight


def is_causal(kind: str) -> bool:
    return kind not in ("none", "vision", "forward")


@hypothesis.given(
    kind=st.sampled_from(KINDS),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    T=st.integers(1, 20),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(
    max_examples=12, deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_heads_and_gradients_are_those_of_a_loop(stand_in, kind, heads, T, scale, seed):
    arrays, mask, weight = inputs(kind, heads, 2, T, seed)
    stand_in.clear()

    def attend(query, key, value):
        return attention.attend(query, key, value, mask, causal=is_causal(kind), scale=scale)

    got, back = jax.vjp(attend, *arrays)
    want, slopes = attend_in_a_loop(
        *arrays, mask, weight, 8**-0.5 if scale is None else scale, None
    )
    assert stand_in
    assert_near(got, want)
    if T > 1:
        for slope, want_slope in zip(back(jnp.asarray(weight)), slopes, strict=True):
            assert_near(slope, want_slope, 2e-6)


@pytest.mark.parametrize("kind", ["none", "vision", "padding", "knockout"])
def test_lanes_are_further_rows(kind, stand_in):
    """Whichever of the arguments have lanes, and if all rows share one mask."""
    B, T, lanes = 2, 6, 3
    arrays, mask, weight = inputs(kind, (4, 2), B, T, 0)
    rng = np.random.default_rng(1)
    factors = rng.uniform(0.5, 1.5, (3, lanes, 1, 1, 1, 1)).astype(np.float32)
    for mask_ in [None] if mask is None else [mask, mask[:1]]:
        given = [*arrays, mask_]
        in_lanes = [array * factor for array, factor in zip(arrays, factors, strict=True)]
        in_lanes.append(
            None if mask_ is None else np.stack([np.roll(mask_, n, -1) for n in range(lanes)])
        )
        for batched in itertools.product([True, False], repeat=4):
            batched = [b and array is not None for b, array in zip(batched, given, strict=True)]
            if not any(batched):
                continue
            args = [s if b else g for s, g, b in zip(in_lanes, given, batched, strict=True)]
            got = jax.vmap(attention.attend, [0 if b else None for b in batched])(*args)
            for n in range(lanes):
                lane = [a[n] if b else a for a, b in zip(args, batched, strict=True)]
                want, _ = attend_in_a_loop(*lane, weight, 8**-0.5, None)
                assert_near(got[n], want)


def test_derivatives_forward_in_lanes_and_of_lanes(stand_in):
    arrays, mask, weight = inputs("padding", (4, 2), 2, 5, 0)

    def attend(query):
        return attention.attend(query, *arrays[1:], mask, causal=True)

    _, slopes = attend_in_a_loop(*arrays, mask, weight, 8**-0.5, None)
    change = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    _, along = jax.jvp(attend, (arrays[0],), (change,))
    assert abs((along * weight).sum() - (slopes[0] * change).sum()) < 1e-5

    def loss(query, factor):
        return (factor * weight * attend(query)).sum()

    factors = jnp.asarray([1.0, 2.0, -3.0])
    each = jax.vmap(jax.grad(loss), (None, 0))(arrays[0], factors)
    of_all = jax.grad(lambda q: jax.vmap(loss, (None, 0))(q, factors).sum())(arrays[0])
    for factor, slope in zip(factors, each, strict=True):
        assert_near(slope, factor * slopes[0], 2e-6)
    assert of_all.shape == arrays[0].shape and np.abs(of_all).max() < 1e-5  # they sum to zero


def test_keys_of_the_past_and_patterns_are_left_to_xla(stand_in):
    arrays, mask, _ = inputs("padding", (4, 2), 2, 5, 0)
    past = (arrays[1], arrays[2])
    attention.attend(*arrays, np.concatenate([mask, mask], -1), past=past)
    attention.attend(*arrays, mask, pattern=lambda p: p)
    attention.attend(*arrays, mask, softcap=2.0)
    assert not stand_in
    attention.attend(*arrays, mask)
    assert stand_in == [(2, 5, 4, 8)]


def test_the_choice(monkeypatch):
    monkeypatch.setattr(cudnn_attention, "is_available", lambda: True)

    def supports(width=64, dtype=jnp.bfloat16, softcap=None):
        return cudnn_attention.supports(jax.ShapeDtypeStruct((2, 8, 4, width), dtype), softcap)

    assert supports() and supports(128) and supports(72) and supports(dtype=jnp.float16)
    assert not supports(dtype=jnp.float32) and not supports(softcap=50.0)
    assert not supports(256) and not supports(60)
    auto = (jax.sharding.AxisType.Auto,) * 3
    one, two = (jax.sharding.AbstractMesh((n, 1, 1), mesh.AXES, auto) for n in (1, 2))
    with jax.sharding.use_abstract_mesh(one):
        assert supports()
    with jax.sharding.use_abstract_mesh(two):
        assert not supports()
    monkeypatch.setattr(cudnn_attention, "is_available", lambda: False)
    assert not supports()


@pytest.mark.parametrize(
    ("backend", "capabilities", "available"),
    [
        ("cpu", (), True), ("gpu", ("9.0",), True), ("gpu", ("8.0", "8.9"), True),
        ("gpu", ("7.5",), False), ("gpu", ("10.0", "7.0"), False),
    ],
)  # fmt: skip
def test_gpus_before_ampere_have_no_such_attention(backend, capabilities, available, monkeypatch):
    devices = [types.SimpleNamespace(compute_capability=c) for c in capabilities]
    monkeypatch.setattr(cudnn_attention, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert cudnn_attention.is_available.__wrapped__() == available


def test_cudnn_may_be_missing(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    assert not cudnn_attention.is_available.__wrapped__()
