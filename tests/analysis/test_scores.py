import numpy as np
import pytest
import scipy.stats

from mllm_jax.analysis import intervals, scores
from tests.helpers.runs import CLASSES, answers


def test_f1_and_accuracy_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    truth = np.random.default_rng(0).integers(0, 3, 40)  # class 3 may be answered, never true
    said = answers(truth, 0.4)
    found = scores.f1(truth, said, CLASSES + 1, resamples=20)  # class 4 is in neither
    labels = [range(CLASSES) if (row == 3).any() else range(3) for row in said]
    options = {"average": "macro", "zero_division": 0}
    want = [metrics.f1_score(truth, r, labels=list(n), **options) for r, n in zip(said, labels)]
    np.testing.assert_allclose(found.runs, want)
    right = scores.accuracy(truth, said, CLASSES)
    np.testing.assert_allclose(right.runs, [metrics.accuracy_score(truth, r) for r in said])


def test_intervals_agree_with_a_loop_over_pictures_and_runs():
    truth = np.random.default_rng(0).integers(0, CLASSES, 30)
    said = answers(truth, 0.5)
    found = scores.f1(truth, said, CLASSES, resamples=40, seed=7)
    samples = []
    pictures = intervals.draws(30, resamples=40, seed=7)
    runs = intervals.draws(3, resamples=40, seed=(7, 1))
    for drawn, chosen in zip(pictures, runs):
        at = np.repeat(np.arange(30), drawn)
        again = scores.f1(truth[at], said[:, at], CLASSES, resamples=2)
        samples.append(np.repeat(again.runs, chosen).mean())
    np.testing.assert_allclose(found.resamples, samples)
    value, low, high = found.interval(0.9)
    np.testing.assert_allclose([low, high], np.quantile(samples, [0.05, 0.95]))
    assert low < value < high and value == found.runs.mean()
    assert found.row() == {"mean": value, "deviation": found.runs.std(ddof=1),
                           **dict(zip(("low", "high"), found.interval()[1:]))}  # fmt: skip


def test_intervals_cover_pictures_and_runs():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        chance = 0.6 + 0.1 * rng.normal(size=(6, 1))  # every run is as good as it happens to be
        said = np.where(rng.random((6, 80)) < chance, 0, 1)
        low, high = scores.accuracy(np.zeros(80, int), said, 2, resamples=300).interval()[1:]
        hits += low <= 0.6 <= high
    assert 0.85 <= hits / 200 <= 0.98  # of 6 runs, a bootstrap knows the deviation a little small


def test_a_difference_is_paired():
    truth = np.random.default_rng(0).integers(0, CLASSES, 200)
    said = answers(truth, 0.5)
    better = said.copy()
    better[:, :20] = truth[:20]
    a, b = (scores.f1(truth, x, CLASSES) for x in (said, better))
    assert scores.difference(b, a).interval().excludes_zero
    alone = np.hypot(*(np.subtract(*x.interval()[:0:-1]) for x in (a, b)))
    assert np.subtract(*scores.difference(b, a).interval()[:0:-1]) < 0.8 * alone
    assert scores.difference(a, a).interval() == (0, 0, 0)
    one = scores.f1(truth, said[:1], CLASSES)
    assert one.deviation is None
    np.testing.assert_allclose(scores.difference(b, one).runs, b.runs - one.runs)


def test_answers_must_fit():
    truth = np.array([0, 1, 2])
    with pytest.raises(ValueError, match=r"answers must be int\[runs, 3\], got \(3,\)"):
        scores.f1(truth, truth, 3)
    with pytest.raises(ValueError, match="class ids must lie in 0 to 1"):
        scores.f1(truth, truth[None], 2)


def test_a_difference_of_none_is_shown_by_enough_pictures_alone():
    """0.95^n, the chance that none of n answers changes although one of twenty may."""
    for pictures, shown in ((58, False), (59, True), (600, True)):
        truth = np.arange(pictures) % 4
        same = scores.f1(truth, truth[None], 4, resamples=50)
        assert scores.equivalent(scores.difference(same, same)) == shown
    truth = np.arange(65) % 4  # one changed answer of 65 is as likely as 16 % at the margin
    same, one = (scores.accuracy(truth, a[None], 4) for a in (truth, np.append(truth[:-1], 3)))
    assert not scores.equivalent(scores.difference(one, same))
    truth = np.arange(600) % 4
    wrong = np.where(np.arange(600) % 8 < 1, (truth + 1) % 4, truth)
    lower = scores.f1(truth, wrong[None], 4, resamples=200)
    gain = scores.difference(lower, scores.f1(truth, truth[None], 4, resamples=200))
    assert not scores.equivalent(gain)  # an eighth of the answers
    assert scores.equivalent(gain, 0.2)
    with pytest.raises(ValueError, match="margin=0: the largest change that counts as none"):
        scores.equivalent(gain, 0)


def test_the_likely_difference_is_found_in_four_of_five_studies():
    """Simulated: pictures of which a share is answered right by one model and wrong by the other.

    The share of studies whose interval excludes zero, at the difference that is told to be likely.
    """
    rng, pictures, classes = np.random.default_rng(0), 200, 4
    truth = np.arange(pictures) % classes

    def gain(change: float) -> scores.Sample:
        before = np.where(rng.random(pictures) < 0.5, truth, (truth + 1) % classes)
        right = np.where(rng.random(pictures) < 2 * change, truth, before)
        worse = np.where(rng.random(pictures) < 0.1, (truth + 1) % classes, right)
        return scores.difference(
            scores.f1(truth, worse[None], classes, resamples=400),
            scores.f1(truth, before[None], classes, resamples=400),
        )

    told = np.mean([scores.detectable(gain(0.12)).likely for _ in range(40)])
    sizes, found = [], []
    for _ in range(250):
        value, low, high = gain(0.118).interval()
        sizes.append(value)
        found.append(low > 0)
    # The power of a normal estimate at the mean difference that was simulated.
    spread = np.std(sizes)
    expected = scipy.stats.norm.sf(1.96 - np.mean(sizes) / spread)
    assert np.mean(found) == pytest.approx(expected, abs=0.1)
    assert told == pytest.approx((1.96 + 0.84) * spread, rel=0.1)


def test_few_pictures_find_nothing():
    truth = np.arange(5) % 2
    same = scores.f1(truth, truth[None], 2, resamples=50)
    assert scores.detectable(scores.difference(same, same)) == (None, None)
