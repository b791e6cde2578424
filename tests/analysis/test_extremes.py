"""Extreme inputs of every function: constants, zeros, huge and tiny numbers, one example, NaN."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.analysis import (
    attribution,
    components,
    deviation,
    domain_neurons,
    intervals,
    jaccard,
    logit_lens,
    official,
    probe,
    projection,
    scores,
    selectors,
    stability,
    stages,
)

RNG = np.random.default_rng(0)
TWO = np.array([0, 0, 0, 1, 1, 1])  # domains of six examples
COUNTS = RNG.integers(0, 20, (2, 3, 50))
TOKENS = np.array([20, 30])
STATES, WEIGHT = RNG.normal(size=(2, 3, 4)), np.ones((1, 2, 3))
SUMS, SOME = RNG.normal(size=(20, 12)), np.full(20, 5)
WEIGHTS = RNG.normal(size=(1, 3, 4))
EXAMPLES = RNG.normal(size=(6, 2, 5))


def with_nan(array, value=np.nan):
    array = np.array(array, np.float64)
    array[(-1,) * array.ndim] = value
    return array


# One call a function and argument: what it is called, the argument, and the call of it.
FINITE = {
    "deviation.sums clean": ("clean", STATES, lambda x: deviation.sums(x, STATES, WEIGHT)),
    "deviation.sums edited": ("edited", STATES, lambda x: deviation.sums(STATES, x, WEIGHT)),
    "deviation.sums weight": ("weight", WEIGHT, lambda x: deviation.sums(STATES, STATES, x)),
    "deviation.sums of JAX": (
        "edited",
        STATES,
        lambda x: deviation.sums(jnp.asarray(STATES), jnp.asarray(x), jnp.asarray(WEIGHT)),
    ),
    "deviation.join": (
        "relative_l2",
        np.ones((1, 2)),
        lambda x: deviation.join([deviation.Sums(x, x, np.ones((1, 2)))]),
    ),
    "deviation.finish": (
        "cosine",
        np.ones((1, 2)),
        lambda x: deviation.finish(deviation.Sums(np.ones((1, 2)), x, np.ones((1, 2)))),
    ),
    "logit_lens sums": (
        "sums",
        np.ones((4, 3, 2)),
        lambda x: logit_lens.entropy_curve(x, np.ones((4, 2), int)),
    ),
    "components.principal": ("features", STATES[0], components.principal),
    "components.between": ("features", STATES[0], lambda x: components.between(x, [0, 0, 1])),
    "attribution.top": ("values", STATES, lambda x: attribution.top(x, 2)),
    "attribution.top_mask": ("values", STATES, lambda x: attribution.top_mask(x, 2)),
    "attribution.first_order": (
        "attribution.values",
        STATES,
        lambda x: attribution.first_order(lambda g: (g**2).sum(), jnp.asarray(x)),
    ),
    "attribution.integrated": (
        "attribution.values",
        STATES,
        lambda x: attribution.integrated(lambda g: (g**2).sum(), jnp.asarray(x), steps=2),
    ),
    "intervals.mean": ("values", SUMS, intervals.mean),
    "intervals.ratio": ("weights", np.ones(20), lambda x: intervals.ratio(SUMS[:, 0], x)),
    "intervals.paired_difference before": (
        "before",
        SUMS,
        lambda x: intervals.paired_difference(x, SUMS),
    ),
    "intervals.paired_difference after": (
        "after",
        SUMS,
        lambda x: intervals.paired_difference(SUMS, x),
    ),
    "intervals.sign_flip": ("differences", np.ones(9), intervals.sign_flip),
    "intervals.holm": ("p_values", np.full(9, 0.5), intervals.holm),
    "intervals.percentiles": ("samples", SUMS, intervals.percentiles),
    "domain_neurons.entropy": ("probability", COUNTS / 20, domain_neurons.entropy),
    "selectors.auroc": ("values", EXAMPLES, lambda x: selectors.auroc(x, TWO)),
    "selectors.aura_gain": ("auroc", np.full((3, 4), 0.7), selectors.aura_gain),
    "selectors.mean_difference sums": (
        "sums",
        COUNTS,
        lambda x: selectors.mean_difference(x, None, TOKENS),
    ),
    "selectors.mean_difference squares": (
        "squares",
        COUNTS + 1e3,
        lambda x: selectors.mean_difference(COUNTS, x, TOKENS),
    ),
    "selectors.mean_difference centred": (
        "centred",
        COUNTS + 1e3,
        lambda x: selectors.mean_difference(COUNTS, None, TOKENS, centred=x),
    ),
    "selectors.mean_difference tokens": (
        "tokens",
        TOKENS,
        lambda x: selectors.mean_difference(COUNTS, None, x),
    ),
    "selectors.weight_change before": (
        "before",
        WEIGHTS,
        lambda x: selectors.weight_change(x, [WEIGHTS]),
    ),
    "selectors.weight_change after": (
        "after[1]",
        WEIGHTS,
        lambda x: selectors.weight_change(WEIGHTS, [WEIGHTS, x]),
    ),
    "selectors.attribution": ("values", EXAMPLES, lambda x: selectors.attribution(x, TWO)),
    "stages.find sums": ("sums", SUMS, lambda x: stages.find(x, SOME)),
    "stages.find tokens": ("tokens", SOME, lambda x: stages.find(SUMS, x)),
    "stages.turning_points": ("curve", SUMS[0], stages.turning_points),
    "stages.bends": ("curve", SUMS[0], stages.bends),
    "probe.prepare": ("features", EXAMPLES, lambda x: probe.prepare(probe.LINEAR, x)),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FINITE)
def test_what_is_not_finite_is_refused_by_name_and_place(name, value):
    argument, array, call = FINITE[name]
    call(np.asarray(array, np.float64))
    with pytest.raises(ValueError, match=re.escape(f"{argument}[")) as caught:
        call(with_nan(array, value))
    last = ", ".join(str(n - 1) for n in np.shape(array))
    shown = "" if name.startswith("attribution.f") or "integrated" in name else value  # a slope's
    assert f"[{last}] is {shown}" in str(caught.value) and "\n" not in str(caught.value)


INTEGERS = {
    "domain_neurons.select": ("counts", COUNTS, lambda x: domain_neurons.select(x, TOKENS)),
    "stability.pool": ("counts", COUNTS, lambda x: stability.pool(x, TOKENS, np.arange(2))),
    "stability.bootstrap": (
        "counts",
        COUNTS,
        lambda x: stability.bootstrap(x, TOKENS, np.arange(2), resamples=2),
    ),
    "scores.f1 truth": ("truth", TWO, lambda x: scores.f1(x, TWO[None], 2, resamples=5)),
    "scores.f1": ("answers", TWO, lambda x: scores.f1(TWO, x[None], 2, resamples=5)),
    "selectors.top": ("k", np.array([1, 2]), lambda x: selectors.top(COUNTS, x)),
    "components.between": ("domain", TWO, lambda x: components.between(EXAMPLES[:, 0], x)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_what_must_be_integers_is(name):
    argument, array, call = INTEGERS[name]
    call(array)
    for wrong in (with_nan(array), array + 0.5):
        with pytest.raises(ValueError, match=rf"{argument}.* must be (6 )?integers"):
            call(wrong)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: domain_neurons.random_mask_like(x, 0),
        lambda x: selectors.overlap({"a": x, "b": x}),
        lambda x: jaccard.of_masks(x, x),
        official.lists,
        lambda x: projection.moved({"lm": x[0]}, {"lm": x[0]}),
    ],
)
def test_a_mask_is_boolean(call):
    mask = RNG.random((2, 3, 4)) < 0.5
    call(mask)
    with pytest.raises(ValueError, match="must be a mask of booleans, not float64"):
        call(with_nan(mask))


@pytest.mark.parametrize(
    ("counts", "tokens", "message"),
    [
        ([[[3, 9]], [[1, 2]]], [8, 8], r"counts\[0, 0, 1\] is 9, but domain 0 has 8 tokens"),
        ([[[3, -1]], [[1, 2]]], [8, 8], "counts has negative entries"),
        ([[[3, 1]], [[1, 2]]], [8, 0], "domain 1 has 0 tokens"),
        ([[[3, 1]], [[1, 2]]], [8, 8, 8], r"tokens must be \[2\]"),
        ([[3, 1], [1, 2]], [8, 8], "counts must be .domains, layers, neurons."),
        ([[[3, np.nan]], [[1, 2]]], [8, 8], "must be integers"),
    ],
)
def test_counts_that_are_none(counts, tokens, message):
    with pytest.raises(ValueError, match=message):
        domain_neurons.select(np.array(counts), np.array(tokens))


def test_counts_above_tokens_of_examples():
    with pytest.raises(ValueError, match=r"counts\[1, 2, 3\] is 31, but example 1 has 30 tokens"):
        counts = np.zeros((2, 3, 4), int)
        counts[1, 2, 3] = 31
        stability.bootstrap(counts, TOKENS, np.arange(2))


def test_a_constant_neuron_is_not_the_first():
    """Its sums in float32 differ by rounding alone, which is no domain's."""
    tokens, neurons = np.array([1000, 3000]), 40
    values = [RNG.normal(10, 1, (n, 1, neurons)).astype(np.float32) for n in tokens]
    for part in values:
        part[..., 7] = 0.1
        part[..., 8] = 0
    values[0][..., 3] += 0.5  # the neuron of the first domain
    sums, squares, centred = (
        np.stack([np.asarray(of(jnp.asarray(part))) for part in values])
        for of in (
            lambda x: x.sum(0), lambda x: (x * x).sum(0),
            lambda x: ((x - x.mean(0)) ** 2).sum(0),
        )
    )  # fmt: skip
    for given in ({"squares": squares}, {"squares": None, "centred": centred}):
        score = selectors.mean_difference(sums, tokens=tokens, **given)
        assert np.isfinite(score).all() and score[0, 0].argmax() == 3
        assert np.abs(score[..., [7, 8]]).max() < 0.3
        np.testing.assert_allclose(score[0, 0, 3], 0.5, atol=0.15)


def test_mean_difference_of_a_large_mean():
    """By centred sums the deviation is right where squares in float32 lose it."""
    values = [1e4 + RNG.normal(size=(500, 2, 3)) + d for d in (0, 0.5, 0)]
    sums = np.stack([x.sum(0) for x in values])
    centred = np.stack([((x - x.mean(0)) ** 2).sum(0) for x in values])
    found = selectors.mean_difference(sums, None, np.full(3, 500), centred=centred)
    rest = np.concatenate([values[0], values[2]])
    spread = np.sqrt((values[1].var(0) * 500 + rest.var(0) * 1000) / 1500)
    want = (values[1].mean(0) - rest.mean(0)) / spread
    np.testing.assert_allclose(found[1], want, rtol=1e-6)
    assert np.isfinite(selectors.mean_difference(sums, sums**2 / 500, np.full(3, 500))).all()


def test_mean_difference_beside_a_huge_domain():
    sums = np.array([[[1e30]], [[6.0]], [[2.0]]])
    found = selectors.mean_difference(sums, None, [2, 2, 2])
    assert found[0, 0, 0] == 5e29 - 2
    large = np.float32(1e30) * np.array([[[1]], [[3]]], np.float32)
    spread = selectors.mean_difference(large, np.float64(large) ** 2 * 2, [1, 1])
    np.testing.assert_allclose(spread[:, 0, 0], [-2 / np.sqrt(5), 2 / np.sqrt(5)], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1, 1e30, 1e300])
def test_weights_of_any_size(scale):
    after = [WEIGHTS + 1, -WEIGHTS, np.zeros_like(WEIGHTS)]
    want = selectors.weight_change(WEIGHTS, after)
    found = selectors.weight_change(WEIGHTS * scale, [a * scale for a in after])
    np.testing.assert_allclose(found, want, rtol=1e-12)
    np.testing.assert_allclose(want[1:], [np.full((1, 3), 2), np.ones((1, 3))])


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("scale", [1e-20, 1, 1e30])
def test_states_of_any_size(scale, make):
    """In float32 the squares of 1e30 are infinite, and those of 1e-30 zero."""
    clean, edited = STATES, STATES + np.where(np.arange(3)[:, None] > 0, 0.5, 0)
    want = deviation.sums(clean, edited, WEIGHT)
    found = deviation.sums(
        make(np.float32(clean * scale)), make(np.float32(edited * scale)), make(WEIGHT)
    )
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_nan_of_a_counted_token_stays_nan_under_jit():
    broken = jnp.asarray(with_nan(STATES))
    found = jax.jit(deviation.sums)(jnp.asarray(STATES), broken, jnp.asarray(WEIGHT))
    assert np.isnan(found.cosine[0, 1]) and np.isnan(found.relative_l2[0, 1])
    assert np.isfinite(found.cosine[0, 0])
    with pytest.raises(ValueError, match=r"relative_l2\[0, 1\] is nan"):
        deviation.join([found])
    hidden = np.array(WEIGHT)
    hidden[0, 1, 2] = 0  # padding may hold anything
    assert all(
        np.isfinite(part).all() for part in deviation.sums(STATES, np.asarray(broken), hidden)
    )


def test_components_of_what_does_not_vary():
    found = components.principal(np.full((5, 3), 0.1), k=2)
    assert not found.share.any() and not found.scores.any()
    np.testing.assert_array_equal(found.centre, [0.1] * 3)
    assert components.between(np.full((5, 3), 0.1), [0, 0, 1, 1, 1]) == 0
    points = RNG.normal(size=(9, 3))
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(
            components.principal(points * scale).share, components.principal(points).share
        )
        domain = np.arange(9) % 2
        want = components.between(points, domain)
        np.testing.assert_allclose(components.between(points * scale, domain), want)
    shifted = components.principal(points + 1e8)
    np.testing.assert_allclose(shifted.share, components.principal(points).share, rtol=1e-5)


def test_curves_that_are_flat_or_small():
    flat = np.full((20, 12), 0.3)
    assert stages.find(flat, SOME).verdict == "undecided: one straight line fits every layer"
    assert stages.turning_points(np.full(12, 0.3)) == []
    bent = np.abs(np.arange(12) - 6.0)
    for scale in (1e-12, 1, 1e12):
        assert stages.turning_points(bent * scale) == [6]


def test_a_feature_that_does_not_vary():
    train = np.stack([np.full(10, 0.1), RNG.normal(size=10)], -1)[None]
    made, other = probe.prepare(probe.LINEAR, train, train + 1e-3)
    assert np.abs(made[..., 0]).max() < 1e-6 and np.abs(other[..., 0]).max() < 2e-3
    np.testing.assert_allclose(made[..., 1].std(), 1, rtol=1e-5)
    with pytest.raises(ValueError, match=r"features\[0, 0, 0\] is inf; every value must be finite"):
        probe.prepare(probe.LINEAR, np.full((1, 2, 1), 1e60))
    with pytest.raises(ValueError, match="two training examples or more, got one"):
        probe.prepare(probe.matched(2), train[:, :1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.sign_flip([]), "differences is empty"),
        (lambda: intervals.percentiles(np.zeros((0, 2))), "samples is empty"),
        (lambda: intervals.mean([]), "at least one example"),
        (lambda: intervals.mean([1.0], resamples=0), "resamples=0"),
        (lambda: intervals.ratio([1.0, 2.0], [1.0, -1.0]), r"weights\[1\] is -1.0; no value may"),
        (lambda: intervals.ratio(np.ones((4, 3)), np.ones((4, 2))), "weights .* do not fit sums"),
        (lambda: intervals.mean(["a", "b"]), "values must hold real numbers"),
        (lambda: attribution.top(np.ones(3), -1), "count=-1 is below 0"),
        (lambda: components.between(np.zeros((0, 3)), np.zeros(0, int)), "of no example"),
        (lambda: domain_neurons.select_modules({}, {}), "counts are of no module"),
        (lambda: selectors.mean_difference(COUNTS[:1], None, [20]), "two or more"),
        (lambda: selectors.auroc(np.zeros((0, 1, 2)), np.zeros(0, int)), "are of no example"),
        (lambda: selectors.weight_change(WEIGHTS, []), "weights must be"),
        (lambda: stages.bends(SUMS[0], window=1), "a slope needs two layers"),
        (lambda: stages.turning_points([]), "curve has no layer"),
        (lambda: deviation.join([]), "batches has no sums"),
        (lambda: probe.hold_out(TWO, np.nan), "share=nan lies outside"),
        (lambda: scores.f1(np.zeros(0, int), np.zeros((1, 0), int), 2), "answers must be"),
        (lambda: scores.f1(TWO, TWO[None] - 2, 2), "-1 is an answer of no class"),
        (lambda: projection.uniform(3, 0, 1), "classes=0"),
    ],
)
def test_nothing_and_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
