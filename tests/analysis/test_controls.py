"""Controls that match neurons by layer and activation rate, or are active in every domain."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.analysis import controls, domain_neurons

BOUND = 0.02


def means(drawn, rate):
    """The mean rate of every draw, domain and layer, by loops; None without neurons."""
    out = {}
    for r, d, layer in np.ndindex(drawn.shape[:3]):
        values = [rate[d, layer, n] for n in range(rate.shape[-1]) if drawn[r, d, layer, n]]
        out[r, d, layer] = sum(values) / len(values) if values else None
    return out


def no_exchange_helps(taken, others, wanted):
    """Whether no exchange of one neuron brings the mean rate closer, by all exchanges."""
    miss = abs(sum(taken) - sum(wanted))
    exchanges = (abs(sum(taken) - out + into - sum(wanted)) for out in taken for into in others)
    return all(other >= miss * (1 - 1e-6) for other in exchanges)


@st.composite
def problems(draw):
    """Skewed rates and masks of any share of the neurons, up to all of them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    domains, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    neurons = draw(st.sampled_from([1, 2, 5, 12, 60]))
    low, high = draw(st.sampled_from([(0.1, 2), (0.3, 0.3), (4, 0.2), (1, 1)]))
    rate = rng.beta(low, high, (domains, layers, neurons))
    if draw(st.booleans()):
        rate = np.round(rate, 1)  # ties
    # the most active ones, as the selection takes them, or any
    score = rate if draw(st.booleans()) else rng.random(rate.shape)
    share = draw(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]))
    mask = score.argsort(-1).argsort(-1) >= neurons - round(share * neurons)
    return mask, rate, draw(st.integers(0, 100))


@settings(deadline=None, max_examples=120)
@given(problems())
def test_each_draw_has_as_many_other_neurons_of_the_layer_at_nearly_their_rate(problem):
    mask, rate, key = problem
    found = controls.rate_matched(mask, rate, draws=3, key=key)
    selected = mask.any(axis=0)
    assert not (found.mask & selected).any()
    got, want = means(found.mask, rate), means(mask[None], rate)
    told = found.unmatched()
    for d, layer in np.ndindex(mask.shape[:2]):
        needed, pool = mask[d, layer].sum(), (~selected[layer]).sum()
        sizes = found.mask[:, d, layer].sum(axis=-1)
        assert (sizes == min(needed, pool)).all()
        assert found.missing[d, layer] == max(0, needed - pool)
        if not needed:
            assert np.isnan(found.difference[d, layer]) and (d, layer) not in told
            continue
        assert found.rate[d, layer] == pytest.approx(want[0, d, layer])
        misses = []
        for r in range(3):
            taken = found.mask[r, d, layer]
            if got[r, d, layer] is None:
                continue
            assert found.drawn_rate[r, d, layer] == pytest.approx(got[r, d, layer])
            misses.append(got[r, d, layer] - want[0, d, layer])
            others = rate[d, layer, ~selected[layer] & ~taken]
            within = abs(misses[-1]) <= BOUND * (1 + 1e-9)
            wanted = rate[d, layer, mask[d, layer]]
            assert (
                within or needed > pool or no_exchange_helps(rate[d, layer, taken], others, wanted)
            )
        beyond = bool(misses) and abs(np.mean(misses)) > BOUND * (1 + 1e-9)
        assert ((d, layer) in told) == (beyond or needed > pool)
        if misses:
            assert found.difference[d, layer] == pytest.approx(np.mean(misses))


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 4), st.sampled_from([0.2, 1, 5])
)
def test_few_neurons_against_all_sets_of_them(seed, pool, needed, skew):
    """Where one set in ten is within half of the bound, so is the draw."""
    needed = min(needed, pool)
    rate = np.random.default_rng(seed).beta(skew, 1, (1, 1, pool + needed))
    mask = (np.arange(pool + needed) >= pool)[None, None]
    wanted = rate[mask].mean()
    sets = [np.mean(s) for s in itertools.combinations(rate[0, 0, :pool], needed)]
    found = controls.rate_matched(mask, rate, draws=2, key=seed)
    if np.mean(np.abs(np.array(sets) - wanted) <= BOUND / 2) >= 0.1:
        assert np.abs(found.drawn_rate - wanted).max() <= BOUND
    if needed == 1:
        nearest = np.abs(rate[0, 0, :pool] - wanted).min()
        assert np.abs(found.drawn_rate - wanted).max() <= max(BOUND, nearest) + 1e-12


@pytest.mark.parametrize("skew", [(0.2, 2.0), (1.0, 6.0), (0.3, 0.3)])
def test_the_domain_neurons_of_a_skewed_layer_are_matched(skew):
    """2 % of the neurons, active on 94 % of the tokens where a random one is on far fewer."""
    rng = np.random.default_rng(1)
    rate = rng.beta(*skew, (2, 4, 3000))
    rate[..., :150] = rng.uniform(0.9, 0.99, (2, 4, 150))
    mask = np.zeros(rate.shape, bool)
    mask[0, :, :60] = mask[1, :, 30:90] = True
    found = controls.rate_matched(mask, rate, draws=10)
    assert np.abs(found.drawn_rate - found.rate).max() <= BOUND and not found.unmatched()
    assert (found.mask.sum(axis=-1) == 60).all()
    pairs = itertools.combinations(found.mask, 2)
    assert all((a ^ b).sum() > 0 for a, b in pairs)  # the draws differ
    taken = found.mask[:, 0].any(axis=0).sum(axis=-1)
    assert (taken > 60).all()


def test_neurons_are_taken_pair_by_pair_not_only_by_their_mean():
    """Of neurons active on 5 and on 95 % of the tokens, the controls are active alike."""
    rng = np.random.default_rng(0)
    rate = rng.random((1, 1, 4000))
    rate[0, 0, :10], rate[0, 0, 10:20] = 0.05, 0.95
    mask = (np.arange(4000) < 20)[None, None]
    for drawn in controls.rate_matched(mask, rate, draws=5).mask:
        low, high = np.split(np.sort(rate[drawn]), 2)
        assert np.abs(low - 0.05).max() <= 0.025 and np.abs(high - 0.95).max() <= 0.025


def test_a_layer_of_nearly_selected_neurons_tells_what_it_lacks():
    rate = np.full((1, 2, 10), 0.9)
    rate[0, 0, 9], rate[0, 1, 5:] = 0.1, 0.3
    mask = np.zeros((1, 2, 10), bool)
    mask[0, 0, :9] = mask[0, 1, :5] = True
    found = controls.rate_matched(mask, rate, draws=2)
    assert found.missing.tolist() == [[8, 0]]
    np.testing.assert_allclose(found.difference, [[-0.8, -0.6]])
    assert found.unmatched() == [(0, 0), (0, 1)]
    whole = controls.rate_matched(np.ones((1, 1, 4), bool), np.ones((1, 1, 4)))
    assert whole.missing.tolist() == [[4]] and whole.unmatched() == [(0, 0)]
    assert np.isnan(whole.difference).all() and not whole.mask.any()


def test_excluded_neurons_and_keys():
    rate = np.random.default_rng(0).random((1, 1, 200))
    mask = (np.arange(200) < 5)[None, None]
    exclude = (np.arange(200) < 100)[None]
    first = controls.rate_matched(mask, rate, key=1, exclude=exclude)
    assert not first.mask[..., :100].any()
    again = controls.rate_matched(mask, rate, key=1, exclude=exclude)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert (controls.rate_matched(mask, rate, key=2, exclude=exclude).mask != first.mask).any()


@pytest.mark.parametrize("seed", range(5))
def test_means_are_matched_among_neurons_of_like_rates(seed):
    rng = np.random.default_rng(seed)
    rate = rng.beta(0.5, 2, (2, 3, 800))
    mean = rate * rng.lognormal(size=rate.shape) - 0.1
    mask = np.zeros(rate.shape, bool)
    mask[0, :, :25] = mask[1, 1, 10:40] = True
    mean[mask] += 0.3
    alone = controls.rate_matched(mask, rate, draws=4, key=seed)
    found = controls.rate_matched(mask, rate, mean, draws=4, key=seed)
    assert np.nanmax(np.abs(found.drawn_rate - found.rate)) <= BOUND
    assert (found.mask.sum(-1) == mask.sum(-1)).all() and not (found.mask & mask.any(0)).any()
    wanted = controls.mean_rate(mask, mean)
    near, far = (
        np.abs(controls.mean_rate(control.mask, mean) - wanted)[:, mask.any(-1)]
        for control in (found, alone)
    )
    assert near.max() <= 0.021 * np.nanmax(np.abs(wanted)) < 0.25 * far.mean()
    assert len({draw.tobytes() for draw in found.mask}) == 4


def test_a_mean_that_no_neuron_of_like_rate_has():
    """Exchanges are between like rates alone, though another neuron has the very mean."""
    rate = np.array([[[0.5, 0.505, 0.495, 0.9]]])
    mean = np.array([[[5.0, 1.0, 2.0, 5.0]]])
    mask = np.array([[[True, False, False, False]]])
    found = controls.rate_matched(mask, rate, mean, draws=3)
    assert found.mask[:, 0, 0].tolist() == [[False, False, True, False]] * 3
    with pytest.raises(ValueError, match="mean must be of the shape"):
        controls.rate_matched(mask, rate, mean[..., :3])


def test_high_entropy_neurons_are_of_no_domain():
    rng = np.random.default_rng(0)
    rate = rng.uniform(0, 1, (3, 2, 400))
    entropy = domain_neurons.entropy(rate)
    mask = np.zeros(rate.shape, bool)
    mask[0, 0, :30] = mask[1, 0, 20:40] = mask[2, 1, 5] = True
    drawn = controls.high_entropy(mask, entropy, draws=4, key=1)
    assert (drawn.sum(-1) == mask.sum(-1)).all()
    assert not (drawn & mask.any(0)).any()
    for layer in range(2):
        others = entropy[layer, ~mask.any(0)[layer]]
        least = np.sort(others)[-math.ceil(0.25 * len(others))]
        assert entropy[layer][drawn[:, :, layer].any((0, 1))].min() >= least
    assert len({draw.tobytes() for draw in drawn}) == 4
    assert (drawn == controls.high_entropy(mask, entropy, draws=4, key=1)).all()
    all_others = controls.high_entropy(mask, entropy, draws=1, share=1)
    assert (all_others.sum(-1) == mask.sum(-1)).all()
    few = np.ones((1, 1, 4), bool)
    few[..., 0] = False
    assert controls.high_entropy(few, np.ones((1, 4)))[0].tolist() == [[[True] + [False] * 3]]
    with pytest.raises(ValueError, match=r"shape \(2, 400\)"):
        controls.high_entropy(mask, entropy[:1])


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"rate": np.full((1, 1, 3), 1.5)}, "between 0 and 1"),
        ({"rate": np.zeros((1, 1, 4))}, "in the shape of mask"),
        ({"rate": np.full((1, 1, 3), np.nan)}, "is nan"),
        ({"draws": 0}, "draws=0"),
        ({"tolerance": 2}, "tolerance=2"),
        ({"exclude": np.zeros((2, 3), bool)}, "exclude must be of shape"),
        ({"mask": np.zeros((1, 1, 3))}, "mask of booleans"),
    ],
)
def test_errors(fields, says):
    given = {"mask": np.ones((1, 1, 3), bool), "rate": np.zeros((1, 1, 3))} | fields
    with pytest.raises(ValueError, match=says):
        controls.rate_matched(given.pop("mask"), given.pop("rate"), **given)
