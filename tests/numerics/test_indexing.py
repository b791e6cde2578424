"""In bfloat16 on CPU, no program holds a float32 copy of all layers; gradients stay what they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from mllm_jax.interventions.tap import Resume, Taps
from mllm_jax.numerics import indexing

L, B, T, D, F = 16, 1, 4, 128, 256
STACK = 2 * L * D * F * 4  # bytes in float32
CONVERTS_ALL = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 12)


def weights(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    up, down = (rng.normal(size=s) / s[1] ** 0.5 for s in ((L, D, F), (L, F, D)))
    return {"up": jnp.asarray(up, dtype), "down": jnp.asarray(down, dtype)}


def states(dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), dtype)


def step(layer, x, tap, extra):
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None


def scanned(layers, x, **how):
    return Taps(**how).module("lm").scan(step, layers, x)[0]


def plain(layers, x):
    """As JAX does it."""
    return jax.lax.scan(lambda x, layer: step(layer, x, None, None), x, layers)[0]


def resumed(layers, x):
    return scanned(layers, x, resume={"lm": Resume(jnp.int32(3), x, {})})


def decoded(layers, x):
    """As in generation: the layers are the same in every step."""
    return jax.lax.fori_loop(0, x.shape[0] + 2, lambda _, x: scanned(layers, x), x)


def swept(layers, x):
    return jax.vmap(lambda scale: resumed(layers, x * scale))(jnp.ones((3, 1, 1, 1), x.dtype))


def slope(layers, x, **how):
    """By what enters the layers, as gradients of edits are."""
    return jax.grad(lambda x: scanned(layers, x, **how).astype(jnp.float32).sum())(x)


def rematerialised(layers, x):
    return slope(layers, x, remat=True)


def temporary(function, *args) -> int:
    """Bytes that the compiled program needs besides its arguments and results."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("function", [scanned, resumed, decoded, swept, rematerialised])
def test_one_layer_is_converted_at_a_time(function):
    assert temporary(function, weights(), states()) < STACK / 4


def test_without_it_they_all_are():
    """Before jaxlib 0.12. When that is the oldest that is supported, the module can go."""
    assert (temporary(plain, weights(), states()) > STACK) == CONVERTS_ALL


def test_a_row_of_a_table():
    table, ids = weights()["up"].reshape(-1, F), jnp.arange(3)

    def words(table, ids, read):
        return jax.lax.fori_loop(0, 4, lambda _, ids: read(table, ids)[:, 0].astype(int), ids)

    def ours(table, ids):
        return indexing.index_without_upcast(table[ids], table, ids)

    sizes = [temporary(lambda *a, r=r: words(*a, r), table, ids) for r in (ours, lambda t, i: t[i])]
    assert sizes[0] < table.size
    assert (table.size < sizes[1]) == CONVERTS_ALL
    np.testing.assert_array_equal(jax.jit(ours)(table, ids), table[ids])


@pytest.mark.parametrize("remat", [False, True])
def test_gradients(remat):
    """Of the weights and of what enters: no further from float32's than those of a plain scan."""

    def gradients(function, dtype):
        def loss(layers, x):
            return (function(layers, x).astype(jnp.float32) ** 2).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(weights(dtype), states(dtype)))

    ours = gradients(lambda layers, x: scanned(layers, x, remat=remat), "bfloat16")
    theirs, exact = gradients(plain, "bfloat16"), gradients(plain, "float32")
    for a, b, want in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        ours_, theirs_ = (jnp.linalg.norm(g.astype(jnp.float32) - want) for g in (a, b))
        assert 0 < ours_ <= 1.1 * theirs_ < 0.1 * jnp.linalg.norm(want)


@pytest.mark.parametrize("dtype, platform", [("float32", "cpu"), ("bfloat16", "tpu")])
def test_where_nothing_is_converted_nothing_is_done(dtype, platform):
    traced = jax.jit(decoded).trace(weights(dtype), states(dtype))
    assert "optimization_barrier" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_float32_is_traced_as_it_was():
    args = weights("float32"), states("float32")
    texts = [jax.jit(f).lower(*args).as_text() for f in (scanned, plain)]
    assert texts[0].replace("jit_scanned", "jit_plain") == texts[1]
