"""Attention row by row, after a past and in blocks of keys is attention on the whole."""

from __future__ import annotations

import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mllm_jax.families.llava import model as llava
from mllm_jax.models import attention, blockwise_attention
from mllm_jax.numerics import rows
from mllm_jax.planning import programs
from mllm_jax.sharding.mesh import AXES
from tests.models.attention_loop import KINDS, assert_near, attend_in_a_loop, masks


def arrays(past: int, masked: bool):
    rng = np.random.default_rng(0)
    B, T, S, N, K, H = 3, 5, 5, 4, 2, 6
    query = rng.normal(size=(B, T, N, H)).astype(np.float32)
    key, value = rng.normal(size=(2, B, K, S, H)).astype(np.float32)
    mask = rng.random((B, 1, T, S)) < 0.6 if masked else None
    if masked:
        mask[1, 0, 2] = False  # may look nowhere
    before = (key[:, :, :past], value[:, :, :past]) if past else None
    return query, key[:, :, past:], value[:, :, past:], mask, before


def by_hand(query, key, value, mask, past):
    if past is not None:
        key, value = (np.concatenate(pair, 2) for pair in zip(past, (key, value), strict=True))
    groups = query.shape[2] // key.shape[1]
    key, value = (a.repeat(groups, 1) for a in (key, value))
    scores = np.exp(query.transpose(0, 2, 1, 3) @ key.swapaxes(2, 3) / query.shape[-1] ** 0.5)
    scores = scores if mask is None else scores * mask
    return (scores / np.maximum(scores.sum(-1, keepdims=True), 1e-30) @ value).swapaxes(1, 2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("at_once", [2**20, 0])
def test_attention(at_once, past, masked, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ELEMENTS_AT_ONCE", at_once)
    *inputs, before = arrays(past, masked)
    got = jax.jit(lambda *a, past: attention.attend(*a, past=past))(*inputs, past=before)
    np.testing.assert_allclose(got, by_hand(*inputs, before), rtol=0, atol=1e-6)


def test_rows_may_share_a_mask(monkeypatch):
    monkeypatch.setattr(rows, "MAX_ELEMENTS_AT_ONCE", 0)
    query, key, value, mask, _ = arrays(0, True)
    got = attention.attend(query, key, value, mask[1:2])
    want = by_hand(query, key, value, mask[[1, 1, 1]], None)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_row_by_row_has_the_same_slope(monkeypatch):
    query, *rest, _ = arrays(0, True)

    def slope(query):
        return jax.jit(jax.grad(lambda q: (attention.attend(q, *rest) ** 2).sum()))(query)

    want = slope(query)
    monkeypatch.setattr(rows, "MAX_ELEMENTS_AT_ONCE", 0)
    np.testing.assert_allclose(slope(query), want, rtol=0, atol=1e-6)


def test_who_reads_the_pattern_sees_all_rows(monkeypatch):
    monkeypatch.setattr(rows, "MAX_ELEMENTS_AT_ONCE", 0)
    inputs = arrays(2, True)
    seen = []
    attention.attend(*inputs[:4], past=inputs[4], pattern=lambda p: seen.append(p.shape) or p)
    assert seen == [(3, 4, 5, 5)]


@pytest.fixture
def in_blocks(monkeypatch):
    """Attend in blocks of 16 keys whatever the length."""
    monkeypatch.setattr(attention, "MAX_SCORES_AT_ONCE", 0)
    monkeypatch.setattr(attention, "MAX_SCORES_OF_ALL_KEYS", 0)
    monkeypatch.setattr(blockwise_attention, "KEYS", 16)


@hypothesis.given(
    kind=st.sampled_from(KINDS),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    T=st.integers(1, 40),
    past=st.sampled_from([0, 0, 7]),
    most=st.sampled_from([0, 0, 2**24]),  # scores of all keys: 0 for keys in blocks
    scale=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(
    max_examples=12, deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_blocks_are_a_loop_over_queries(
    in_blocks, monkeypatch, kind, heads, T, past, most, scale, softcap, seed
):
    monkeypatch.setattr(attention, "MAX_SCORES_OF_ALL_KEYS", most)
    rng, (N, K), S = np.random.default_rng(seed), heads, T + past
    query, weight = rng.normal(size=(2, 2, T, N, 5)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, K, S, 5)).astype(np.float32)
    mask = masks(kind, rng, 2, N, T, S)

    def attend(query, key, value):
        before = (key[:, :, :past], value[:, :, :past]) if past else None
        return attention.attend(
            query, key[:, :, past:], value[:, :, past:], mask, past=before,
            causal=kind not in ("none", "vision", "forward"), scale=scale, softcap=softcap,
        )  # fmt: skip

    @jax.jit
    def compute(*inputs):
        heads, back = jax.vjp(attend, *inputs)
        return heads, back(jnp.asarray(weight))

    got, slopes = compute(query, key, value)
    want, want_slopes = attend_in_a_loop(
        query, key, value, mask, weight, 5**-0.5 if scale is None else scale, softcap
    )
    assert_near(got, want)
    if S > 1:  # of one key nothing depends on queries and keys
        for slope, want_slope in zip(slopes, want_slopes, strict=True):
            assert_near(slope, want_slope)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [0, 2 * 2 * 21 * 16, 4 * 2 * 21 * 16])  # heads of keys: 1, 2, 4
def test_blocks_of_few_rows_and_heads(in_blocks, most, kind):
    """As on a TPU, where a block of all of them does not stay on the chip."""
    B, T, N, K, H = 3, 21, 4, 2, 5
    rng = np.random.default_rng(0)
    query, weight = rng.normal(size=(2, B, T, N, H)).astype(np.float32)
    key, value = rng.normal(size=(2, B, K, T, H)).astype(np.float32)
    mask = masks(kind, rng, B, N, T, T)

    def attend(*arrays):
        return attention._attend_in_blocks(
            attention.ScoreRule(H**-0.5), most, arrays[0], [arrays[1:]], mask
        )

    heads, back = jax.vjp(attend, query, key, value)
    want, slopes = attend_in_a_loop(query, key, value, mask, weight, H**-0.5, None)
    assert_near(heads, want)
    for got, slope in zip(back(jnp.asarray(weight)), slopes, strict=True):
        assert_near(got, slope)


@hypothesis.given(
    B=st.integers(1, 60), K=st.integers(1, 16), G=st.integers(1, 4), T=st.integers(1, 2000),
    most=st.integers(0, 2**24), shards=st.sampled_from([(1, 1), (4, 2), (8, 1)]),
)  # fmt: skip
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_parts_of_rows_and_heads(B, K, G, T, most, shards):
    """They are as few as possible, and together the whole."""
    B, K = B * shards[0], K * shards[1]
    query = jax.ShapeDtypeStruct((B, K, G, T, 8), jnp.float32)
    size, types = (shards[0], 1, shards[1]), (jax.sharding.AxisType.Auto,) * 3
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(size, AXES, types)):
        parts = blockwise_attention.Parts.of(query, most)
    assert parts.shards == shards
    rows, heads = (n // s // c for n, s, c in zip((B, K), shards, parts.counts, strict=True))
    of_a_head = G * T * blockwise_attention.KEYS
    assert rows * heads * of_a_head <= most or rows == heads == 1
    assert rows == 1 or parts.counts[1] == 1
    assert parts.counts[0] == 1 or (parts.counts[0] - 1) * rows < B // shards[0]
    whole = np.arange(B * K * 3).reshape(B, K, 3)
    split = parts.split(whole)
    assert split.shape == (parts.count, rows * shards[0], heads * shards[1], 3)
    np.testing.assert_array_equal(parts.join(split), whole)
    # A device keeps its own rows: those of a part are from every shard.
    own = B // shards[0] * K * 3
    of_shards = np.asarray(split)[:, :, 0, 0].reshape(parts.count, shards[0], rows) // own
    np.testing.assert_array_equal(
        of_shards, np.broadcast_to(np.arange(shards[0])[:, None], of_shards.shape)
    )
    np.testing.assert_array_equal(
        parts.split(whole[:1]), parts.split(whole[:1].repeat(B, 0))[:, :1]
    )


def test_blocks_are_differentiated_forward_and_twice(in_blocks, monkeypatch):
    rng = np.random.default_rng(0)
    query, key, value, mask, _ = arrays(0, True)
    change = rng.normal(size=query.shape).astype(np.float32)

    def compute():
        def attend(query):
            return attention.attend(query, key, value, mask, softcap=2.0)

        slope = jax.grad(lambda query: (attend(query) ** 3).sum())
        run = jax.jit(lambda q, d: (jax.jvp(attend, (q,), (d,)), jax.jvp(slope, (q,), (d,))))
        return jax.tree.leaves(run(query, change))

    blocks = compute()
    monkeypatch.setattr(attention, "MAX_SCORES_AT_ONCE", 2**18)
    for got, want in zip(blocks, compute(), strict=True):
        assert_near(got, want)


def test_blocks_under_vmap(in_blocks):
    query, key, value, mask, _ = arrays(0, True)
    lanes = jnp.stack([query, 2 * query])
    attend = functools.partial(attention.attend, key=key, value=value, mask=mask)
    got = jax.jit(jax.vmap(attend))(lanes)
    for lane, query in zip(got, lanes, strict=True):
        assert_near(lane, by_hand(np.asarray(query), key, value, mask, None))


def test_blocks_show_what_is_not_a_number(in_blocks):
    """In the queries that attend to it, and in no others."""
    query, key, value, mask, _ = arrays(0, True)
    key[0, :, 3] = np.nan
    got = np.isnan(attention.attend(query, key, value, mask)).all((2, 3))
    np.testing.assert_array_equal(got, mask[:, 0, :, 3] & (np.arange(3) == 0)[:, None])


def test_blocks_of_bfloat16_are_as_near_as_all_at_once(in_blocks, monkeypatch):
    query, key, value, mask, _ = arrays(0, True)
    low = [jnp.asarray(array, jnp.bfloat16) for array in (query, key, value)]
    want = by_hand(*(np.asarray(array, np.float32) for array in low), mask, None)
    got = attention.attend(*low, mask)
    assert got.dtype == jnp.bfloat16
    assert_near(got, want, 4e-3)


@pytest.mark.parametrize("study", ["run", "counts+lens", "e2e"])
def test_no_array_holds_the_scores_of_long_rows(study):
    config = llava.LlavaConfig.tiny()
    size = programs.Size(rows=1, words=600, remat=False)
    network = programs.abstract_model(config, jnp.float32)
    batch = programs.abstract_batch(config, size)
    program = programs.build(study, network, batch.replace(processor=None), None, None, size)
    fn = functools.partial(program.fn, **program.static)
    text = jax.jit(fn).lower(*(tree for _, tree in program.args)).compile().as_text()
    assert batch.ids.shape[1] ** 2 == 640**2 > attention.MAX_SCORES_AT_ONCE
    sizes = {
        shape: math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", text)
    }
    largest = max(sizes, key=lambda shape: sizes[shape])
    blocks = attention.QUERY_BLOCKS
    assert sizes[largest] <= config.lm.heads * 640**2 / blocks, largest
