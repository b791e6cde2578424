import itertools
import math

import numpy as np
import pytest

from mllm_jax.analysis import intervals


def test_mean_agrees_with_a_loop_over_resamples():
    values = np.random.default_rng(0).normal(size=(30, 2))
    found = intervals.mean(values, resamples=50, seed=3)
    means = []
    for drawn in intervals.draws(30, resamples=50, seed=3):
        means.append(np.repeat(values, drawn, axis=0).mean(axis=0))
    np.testing.assert_allclose(found.value, values.mean(axis=0))
    np.testing.assert_allclose(found.low, np.quantile(means, 0.025, axis=0))
    np.testing.assert_allclose(found.high, np.quantile(means, 0.975, axis=0))


def test_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(size=400)
    found = intervals.mean(values)
    expected = 2 * 1.96 * values.std() / np.sqrt(400)
    assert found.high - found.low == pytest.approx(expected, rel=0.05)
    assert found.low < found.value < found.high


def test_seeded():
    values = np.random.default_rng(0).random(20)
    assert intervals.mean(values) == intervals.mean(values)
    assert intervals.mean(values) != intervals.mean(values, seed=1)


def test_coverage():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        found = intervals.mean(rng.random(60) < 0.7, resamples=300, seed=seed)
        hits += found.low <= 0.7 <= found.high
    assert 0.90 <= hits / 200 <= 0.98


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(0)
    before = rng.random(100) * 10
    after = before - 0.5 + rng.normal(size=100) * 0.1
    found = intervals.paired_difference(before, after)
    assert found.value == pytest.approx(-0.5, abs=0.05)
    assert found.high < -0.4 and found.excludes_zero
    assert not intervals.paired_difference(before, before).excludes_zero


def test_ratio_weighs_by_tokens_and_survives_resamples_without_any():
    sums, weights = np.array([[10.0], [0.0], [0.0]]), np.array([[5], [0], [0]])
    found = intervals.ratio(sums, weights)
    assert found.value == found.low == found.high == 2


def test_sign_flip_against_all_flips():
    differences = np.array([1, 1, 1, 1, 0, -1, 0, 1, 1.0])
    changed = differences[differences != 0]
    sums = [
        abs(np.dot(signs, changed)) for signs in itertools.product([-1, 1], repeat=len(changed))
    ]
    exact = np.mean(np.array(sums) >= abs(changed.sum()))
    assert intervals.sign_flip(differences) == pytest.approx(exact, rel=1e-12)
    assert intervals.sign_flip(np.zeros(5)) == 1
    assert intervals.sign_flip(-0.3 * np.ones(30)) == pytest.approx(2 * 2.0**-30)
    sizes = 1 + np.arange(30) / 100
    assert intervals.sign_flip(sizes) == 1 / 10000
    uneven = np.array([1, 0.5, 0.5, 1, 0, -0.25, 0, 1, 0.75])
    flips = itertools.product([-1, 1], repeat=7)
    sums = [abs(np.dot(signs, uneven[uneven != 0])) for signs in flips]
    exact = np.mean(np.array(sums) >= abs(uneven.sum()))
    assert intervals.sign_flip(uneven) == pytest.approx(exact, abs=0.01)


def test_holm():
    np.testing.assert_allclose(intervals.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(intervals.holm([[0.6, 0.9]]), [[1.0, 1.0]])


@pytest.mark.parametrize(("truth", "questions"), [(0.1, 300), (-0.1, 60), (0.0, 300)])
def test_equivalence_is_claimed_of_small_effects_alone(truth, questions):
    """At the margin itself it is claimed at the level, and of no effect nearly always."""
    rng = np.random.default_rng(0)
    claimed = 0
    for _ in range(200):
        own = rng.random(questions) < 0.5 + truth
        control = rng.random((6, questions)) < 0.5
        found = intervals.effect(own.astype(float), control.astype(float))
        claimed += intervals.equivalence(found, 0.1, answers=questions) <= 0.05
    assert claimed / 200 <= 0.08 if truth else claimed / 200 >= 0.8


@pytest.mark.parametrize("questions", [60, 100, 200])
def test_equivalence_of_answers_that_change_to_one_side_is_claimed_at_the_level(questions):
    """A share of the margin is answered wrong: the t test alone claims 12 to 19 % of these."""
    rng = np.random.default_rng(0)
    claimed = 0
    for _ in range(300):
        own = (rng.random(questions) >= 0.05).astype(float)
        found = intervals.effect(own, np.ones((10, questions)))
        claimed += intervals.equivalence(found, 0.05, answers=questions) <= 0.05
    assert claimed / 300 <= 0.08


def test_chance_of_fewer_changes_is_that_of_a_binomial_distribution():
    each = [math.comb(60, k) * 0.05**k * 0.95 ** (60 - k) for k in range(61)]
    for changed in (0, 1, 7, 59):
        chance = intervals.chance_of_fewer(-changed / 60, 0.05, 60)
        assert chance == pytest.approx(sum(each[: changed + 1]))
    assert intervals.chance_of_fewer(1.0, 0.05, 60) == 1
    assert sum(each[:1]) < intervals.chance_of_fewer(0.5 / 60, 0.05, 60) < sum(each[:2])


def test_few_answers_that_do_not_change_show_nothing():
    same = intervals.effect(np.ones(8), np.ones((3, 8)))
    assert intervals.equivalence(same, 0.05, answers=8) == pytest.approx(0.95**8)
    assert intervals.equivalence(same, 0.05) == 0
    assert intervals.equivalence(same._replace(value=0.06), 0.05) == 1
    alone = intervals.effect(np.ones(8), np.ones((1, 8)))
    assert np.isnan(intervals.equivalence(alone, 0.05))
    with pytest.raises(ValueError, match="margin=5"):
        intervals.equivalence(same, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: intervals.mean([]), "at least one example"),
        (lambda: intervals.mean([1.0, np.nan]), r"values\[1\] is nan"),
        (lambda: intervals.mean(1.0), "axis of examples"),
        (lambda: intervals.mean([1.0], level=95), "level=95"),
        (lambda: intervals.paired_difference([1, 0], [1]), r"shapes \(2,\) and \(1,\)"),
        (lambda: intervals.ratio(np.ones((2, 1)), np.zeros((2, 1))), "weights sum to zero"),
        (lambda: intervals.ratio(np.ones(2), np.ones(3)), "2 sums for 3 weights"),
        (lambda: intervals.holm([1.2]), "must lie in"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_effect_covers_the_truth_over_examples_and_draws():
    """The truth is that of all draws that could have been: few draws alone would miss it."""
    rng = np.random.default_rng(0)
    hits = fixed = 0
    for _ in range(400):
        ability, luck = rng.normal(size=40), 0.5 * rng.normal(size=(6, 1))
        own = 0.3 + ability + 0.3 * rng.normal(size=40)
        control = ability + luck + 0.3 * rng.normal(size=(6, 40))
        found = intervals.effect(own, control)
        hits += found.low <= 0.3 <= found.high
        over_examples = intervals.paired_difference(control.mean(axis=0), own, resamples=100)
        fixed += over_examples.low <= 0.3 <= over_examples.high
        assert found.value == pytest.approx((own - control).mean())
    assert 0.92 <= hits / 400 <= 0.99
    assert fixed / 400 < 0.6


def test_differences_of_several_measures_have_the_intervals_of_each():
    rng = np.random.default_rng(0)
    own, control = rng.normal(size=(4, 30)), rng.normal(size=(5, 4, 30))
    own[2] = control[:, 2] = 1.0  # no spread
    found = intervals.difference(own, control)
    for i in range(4):
        alone = intervals.effect(own[i], control[:, i])
        np.testing.assert_allclose([part[i] for part in found], alone[:3], rtol=1e-12)
    assert found.low[2] == found.value[2] == found.high[2] == 0
    single = intervals.difference(own, control[:1])
    assert np.isnan(single.low).all() and np.isfinite(single.value).all()
    with pytest.raises(ValueError, match=r"\[draws, 4, 30\]"):
        intervals.difference(own, control[:, :3])


def test_effect_of_a_draw_alone_has_no_interval():
    found = intervals.effect([0.0, 1.0, 1.0], [[0.0, 1.0, 0.0]])
    assert found.value == pytest.approx(1 / 3)
    assert np.isnan([found.low, found.high, found.p, found.error]).all()
    same = intervals.effect(np.zeros(8), np.zeros((3, 8)))
    assert same[:5] == (0, 0, 0, 1, 0)
    # All change alike: there is no spread, yet three examples are no proof.
    assert intervals.effect(np.ones(3), np.zeros((2, 3))).p == 0.25
    with pytest.raises(ValueError, match=r"\[draws, 3\]"):
        intervals.effect(np.zeros(3), np.zeros((2, 4)))
