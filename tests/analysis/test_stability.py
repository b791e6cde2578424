from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from mllm_jax.analysis import domain_neurons, selectors, stability

PLANTED = (2, 1, 7)  # domain, layer, neuron
RATES = {"top_rate": 0.05, "filter_rate": 0.9, "bar_rate": 0.9}


def examples(seed, *, domains=3, each=24, layers=3, width=60, planted=False, special=0):
    """Counts of examples that differ among themselves: a neuron's rate varies by example.

    Args:
      planted: PLANTED fires on most tokens of its domain, and on few of the others.
      special: How many further neurons fire somewhat more often in one domain.
    """
    rng = np.random.default_rng(seed)
    domain = np.repeat(np.arange(domains), each)
    tokens = rng.integers(80, 120, len(domain))
    base = rng.beta(1.0, 3.0, (layers, width))
    rate = rng.beta(6 * base, 6 * (1 - base), (len(domain), layers, width))
    if planted:
        d, layer, neuron = PLANTED
        rate[:, layer, neuron] = np.where(domain == d, 0.8, 0.05)
    for i in range(special):
        layer, neuron = divmod(i * 7, width)
        low, high = (rng.beta(4 * mean, 4 * (1 - mean), len(domain)) for mean in (0.3, 0.6))
        rate[:, layer, neuron] = np.where(domain == i % domains, high, low)
    return rng.binomial(tokens[:, None, None], rate), tokens, domain


def test_pool_is_a_sum():
    counts, tokens, domain = examples(0)
    pooled, total = stability.pool(counts, tokens, domain)
    for d in range(3):
        np.testing.assert_array_equal(pooled[d], counts[domain == d].sum(axis=0))
        assert total[d] == tokens[domain == d].sum()
    twice = stability.pool(counts, tokens, domain, np.full(len(domain), 2))
    np.testing.assert_array_equal(twice[0], 2 * pooled)
    np.testing.assert_array_equal(twice[1], 2 * total)


def select(counts, tokens):
    return domain_neurons.select(counts, tokens, **RATES).mask


def test_the_planted_neuron_is_found_in_20_of_20_seeds():
    for seed in range(20):
        found = stability.shuffle_test(*examples(seed, planted=True), shuffles=39, **RATES)
        d, layer, neuron = PLANTED
        assert found.p_values[layer, neuron] == 1 / 40, seed
        assert found.mask[:, layer, neuron].tolist() == [False, False, True], seed
        assert found.selection.mask[d, layer, neuron]


def test_shuffled_domains_have_false_neurons_no_more_often_than_the_level():
    level, sets = 0.1, 150
    false = 0
    for seed in range(sets):
        counts, tokens, domain = examples(1000 + seed, each=10, layers=2, width=40, planted=True)
        shuffled = np.random.default_rng(seed).permutation(domain)
        found = stability.shuffle_test(
            counts, tokens, shuffled, shuffles=19, level=level, seed=seed, **RATES
        )
        assert found.selection.selected.sum() == found.selection.k == 4  # selects whatever comes
        false += found.mask.any()
    # what a test of this very level exceeds once in 1,000 times
    assert false <= scipy.stats.binom.isf(1e-3, sets, level)
    assert false >= scipy.stats.binom.ppf(1e-3, sets, level / 2)  # nor is it far below


def test_p_values_are_counts_of_shuffles():
    counts, tokens, domain = examples(3)
    found = stability.shuffle_test(counts, tokens, domain, shuffles=49, **RATES)
    for (layer, neuron), value in np.ndenumerate(found.selection.entropy):
        expected = (1 + (found.lowest <= value).sum()) / 50 if np.isfinite(value) else 1.0
        assert found.p_values[layer, neuron] == expected
    again = stability.shuffle_test(counts, tokens, domain, shuffles=49, **RATES)
    np.testing.assert_array_equal(again.lowest, found.lowest)


def test_halves_agree_more_the_larger_they_are():
    data = examples(5, each=80, special=9)
    found = stability.split_half(*data, sizes=(2, 8, 40), repeats=8, select=select)
    assert found.jaccard.shape == (3, 8, 3) and found.neurons.shape == (3, 3)
    small, middle, large = found.jaccard.mean(axis=(1, 2))
    assert small < middle < large and large > 0.8
    np.testing.assert_allclose(found.neurons.sum(axis=1), 9, atol=6)
    alone = stability.split_half(*data, repeats=1, select=select)
    assert alone.sizes.tolist() == [40]


def test_halves_are_disjoint():
    counts, tokens, domain = examples(5, each=6)
    seen = []

    def spy(pooled, total):
        seen.append(total)
        return np.zeros(pooled.shape, bool)

    stability.split_half(counts, tokens, domain, sizes=(3,), repeats=2, select=spy)
    whole = np.bincount(domain, tokens)
    np.testing.assert_array_equal(seen[0] + seen[1], whole)
    np.testing.assert_array_equal(seen[2] + seen[3], whole)


def test_bootstrap_of_a_planted_neuron():
    found = stability.bootstrap(*examples(7, planted=True), resamples=40, select=select)
    assert found.frequency[PLANTED] == 1.0
    assert found.mask[PLANTED]
    np.testing.assert_array_equal(found.frequency > 0, found.frequency >= 1 / 40 - 1e-12)
    assert (
        (found.jaccard.low <= found.jaccard.value) & (found.jaccard.value <= found.jaccard.high)
    ).all()
    assert 0 < found.frequency[~found.mask].max() < 1


def test_bootstrap_takes_any_selector():
    def mean(counts, tokens):
        return selectors.top(selectors.mean_difference(counts, None, tokens), 1)

    found = stability.bootstrap(*examples(7, planted=True), resamples=10, select=mean)
    assert np.argwhere(found.mask)[2].tolist() == list(PLANTED)
    assert found.frequency[PLANTED] == 1.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": np.ones(3, int)}, "counts must be .N, L, F. with N tokens"),
        ({"counts": np.ones((4, 1, 2))}, "must be integers"),
        ({"domain": np.array([0, 0, 2, 2])}, "every domain from 0 up"),
    ],
)
def test_errors(change, message):
    data = {
        "counts": np.ones((4, 1, 2), int),
        "tokens": np.ones(4, int),
        "domain": np.array([0, 0, 1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        stability.bootstrap(**{**data, **change})
    with pytest.raises(ValueError, match="1 to 1 examples of a domain, not .2."):
        stability.split_half(**data, sizes=(2,))
    with pytest.raises(ValueError, match="level=0.05 cannot be reached by 9 shuffles"):
        stability.shuffle_test(**data, shuffles=9)


@pytest.mark.parametrize(
    ("sizes", "again"),
    [((2, 2), 2 / 6), ((4, 4), 2 / 70), ((2, 3), 1 / 10), ((2, 2, 2), 6 / 90), ((1, 1, 2), 2 / 12)],
)
def test_shuffles_that_are_the_truth_again(sizes, again):
    """Counted: domains may change names where as many examples have them."""
    domain = np.repeat(np.arange(len(sizes)), sizes)

    def division(labels):
        return frozenset(frozenset(np.flatnonzero(labels == d).tolist()) for d in range(len(sizes)))

    every = set(itertools.permutations(domain.tolist()))
    same = sum(division(np.array(labels)) == division(domain) for labels in every)
    assert same / len(every) == pytest.approx(again)
    # of 19 shuffles none may, at level 0.05
    assert stability.power(domain, 19, 0.05) == pytest.approx((1 - again) ** 19)


def test_too_few_examples_to_tell_are_an_error():
    counts, tokens, domain = examples(0, each=2, planted=True)
    two = domain < 2
    with pytest.raises(ValueError, match="by 4 examples: one shuffle of 3 gives the true labels"):
        stability.shuffle_test(counts[two], tokens[two], domain[two], **RATES)


def test_a_shuffle_that_goes_as_low_counts_against():
    one = np.random.default_rng(0).integers(0, 100, (1, 3, 60))
    counts, domain = np.repeat(one, 12, axis=0), np.arange(12) % 3
    found = stability.shuffle_test(counts, np.full(12, 100), domain, shuffles=19, **RATES)
    assert found.selection.selected.any() and (found.p_values == 1).all() and not found.mask.any()
