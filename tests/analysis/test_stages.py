import numpy as np
import pytest

from mllm_jax.analysis import stages

LAYERS = np.arange(30)
THREE = np.select(
    [LAYERS < 8, LAYERS < 22], [10.5, 10.5 - 0.3 * (LAYERS - 7)], 6.3 + 0.1 * (LAYERS - 21)
)


def examples(curve, noise, n=80, seed=0):
    """Entropy sums of n examples: a common curve, an offset of each example, noise."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(40, 60, n)
    offset = 0.5 * rng.normal(size=(n, 1))
    entropy = curve + offset + noise * rng.normal(size=(n, len(curve)))
    return entropy * tokens[:, None], tokens


def test_planted_boundaries_without_noise():
    found = stages.find(THREE[None] * np.array([[5], [7]]), np.array([5, 7]), fewest=2)
    assert found.boundaries == found.low == found.high
    # layer 7 lies on both lines, and so does layer 21
    assert found.boundaries[0] in (7, 8) and found.boundaries[1] in (21, 22)
    np.testing.assert_allclose(found.slopes, [0, -0.3, 0.1], atol=1e-12)
    np.testing.assert_allclose(found.fit, found.curve)
    np.testing.assert_allclose(found.curve, THREE)
    assert found.verdict == "three stages as claimed (flat, falling, rising)"


def test_a_few_examples_decide_nothing():
    few, enough = (stages.find(*examples(THREE, 0.1, n=n)) for n in (15, 16))
    assert enough.claimed and not few.claimed
    assert few.boundaries is None
    assert few.verdict == "undecided: 15 examples are too few, at least 16 are needed"
    assert enough.verdict == "three stages as claimed (flat, falling, rising)"


def test_a_curve_that_jumps():
    curve = np.select([LAYERS < 5, LAYERS < 19], [10.0, 8.0], 9.0)
    found = stages.find(*examples(curve, 0.1))
    assert found.boundaries == (5, 19)
    assert found.verdict == "three segments, not the claimed stages (flat, flat, flat)"


@pytest.mark.parametrize("seed", range(10))
def test_intervals_hold_the_planted_boundaries(seed):
    found = stages.find(*examples(THREE, 1.0, seed=seed), resamples=300)
    assert found.boundaries is not None
    assert found.low[0] - 1 <= 8 <= found.high[0] + 1  # a kink is known to one layer
    assert found.low[1] - 1 <= 22 <= found.high[1] + 1
    assert found.samples.shape == (300, 2)


def test_more_noise_widens_the_intervals():
    width = [
        np.ptp(np.array([found.low, found.high]), axis=0).sum()
        for noise in (0.1, 3.0)
        for found in [stages.find(*examples(THREE, noise), resamples=300)]
    ]
    assert width[0] < width[1]


@pytest.mark.parametrize("curve", [np.full(30, 10.0), 10 - 0.2 * LAYERS], ids=["flat", "straight"])
@pytest.mark.parametrize("noise", [0, 0.1, 1.0])
def test_curves_without_stages_are_undecided(curve, noise):
    for seed in range(5):
        found = stages.find(*examples(curve, noise, seed=seed), resamples=200)
        assert found.boundaries is None
        assert found.verdict.startswith("undecided: ")


def test_two_segments_are_undecided():
    found = stages.find(*examples(np.abs(LAYERS - 15) * 0.3 + 4, 0.1), resamples=200)
    assert found.boundaries is None and found.low is not None
    assert "undecided" in found.verdict


def test_too_few_layers_are_undecided():
    found = stages.find(*examples(THREE[:8], 0.1))
    assert found.boundaries is None and found.low is None
    assert found.verdict == "undecided: 8 layers are too few for three stages of 3"


def test_examples_without_tokens_do_not_count():
    sums, tokens = examples(THREE, 0.5)
    more = stages.find(np.vstack([sums, np.zeros((3, 30))]), np.append(tokens, [0, 0, 0]))
    assert more.boundaries == stages.find(sums, tokens).boundaries


def test_seeded():
    first, second, other = (stages.find(*examples(THREE, 1.0), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.samples, second.samples)
    assert (first.samples != other.samples).any()


def test_turning_points():
    assert stages.turning_points(THREE, window=1) == [21]
    assert stages.turning_points(THREE) == [22]  # the average leans to the gentler slope
    assert stages.turning_points(np.abs(LAYERS - 15)) == [15]
    assert stages.turning_points(10 - LAYERS) == []
    assert stages.turning_points(np.full(30, 3.3)) == []
    assert stages.turning_points([0, 1, 2, 2, 2, 1, 0], window=1) == [4]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: stages.find(np.ones((4, 30)), np.ones(3)), r"sums must be \[N, L\]"),
        (lambda: stages.find(np.ones((1, 30)), np.ones(1)), "at least two examples"),
        (lambda: stages.find(np.ones((4, 30)), np.ones(4), min_length=2), "stage needs three"),
        (lambda: stages.turning_points(THREE, window=2), "must be odd"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bends_are_where_the_slope_changes():
    assert stages.bends(THREE) in ([7, 21], [8, 21], [8, 22])
    assert stages.bends(np.abs(LAYERS - 15.0))[0] <= 15 <= stages.bends(np.abs(LAYERS - 15.0))[1]
    assert stages.bends(THREE[:8]) == [] and len(stages.bends(THREE[:9])) == 2


def test_a_bend_confirms_a_boundary_within_a_layer_of_its_interval():
    for seed in range(5):
        found = stages.find(*examples(THREE, 0.5, seed=seed), resamples=100)
        assert stages.confirmed(found, stages.bends(found.curve)) == [True, True]
    assert stages.confirmed(found, [found.low[0] - 1, found.high[1] + 1]) == [True, True]
    assert stages.confirmed(found, [found.low[0] - 2, found.high[1] + 2]) == [False, False]
    assert stages.confirmed(stages.find(*examples(np.full(30, 9.0), 0.1)), [3]) is None


def test_curves_agree_where_their_intervals_meet():
    one = stages.find(*examples(THREE, 0.1), resamples=100)
    later = np.interp(LAYERS, [0, 14, 22, 29], [10.5, 10.5, 6.3, 7.1])
    other = stages.find(*examples(later, 0.1, seed=1), resamples=100)
    assert stages.agreement(one, one) == [True, True]
    assert stages.agreement(one, other) == stages.agreement(other, one) == [False, True]
    flat = stages.find(*examples(np.full(30, 9.0), 0.1), resamples=100)
    assert stages.agreement(one, flat) is None
