import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mllm_jax.analysis import domain_neurons


def transcription(counts, tokens, top_rate, filter_rate, bar_rate):
    """MMNeuron's selection, step by step in loops, with the edge rules of `select`."""
    domains, layers, neurons = counts.shape
    p = {
        (layer, j, d): int(counts[d, layer, j]) / int(tokens[d])
        for layer in range(layers)
        for j in range(neurons)
        for d in range(domains)
    }
    ascending = sorted(p.values())
    tau = ascending[round(filter_rate * len(ascending)) - 1]
    bar = ascending[round(bar_rate * len(ascending)) - 1]
    candidates, raw = [], np.zeros((layers, neurons))
    for layer in range(layers):
        for j in range(neurons):
            values = [p[layer, j, d] for d in range(domains)]
            total, entropy = 0.0, 0.0
            for value in values:
                total += value
            for value in values:
                if value > 0:
                    q = value / total
                    entropy -= q * float(np.log(q))
            raw[layer, j] = entropy
            if max(values) > tau:
                candidates.append((entropy, layer, j))
    k = round(top_rate * layers * neurons)

    def rank(candidate):  # of equal entropies the most active neuron first
        value, layer, j = candidate
        return value, -max(p[layer, j, d] for d in range(domains)), layer, j

    chosen = sorted(sorted(candidates, key=rank)[:k])
    members = [
        sorted((layer, j) for _, layer, j in chosen if p[layer, j, d] > bar) for d in range(domains)
    ]
    return tau, bar, k, raw, candidates, chosen, members


def toy(modulus, domain_step):
    layer, j, d = np.meshgrid(np.arange(2), np.arange(20), np.arange(3), indexing="ij")
    counts = (37 * (20 * layer + j) * (d + 1) + domain_step * d + 13 * layer) % modulus
    return counts.transpose(2, 0, 1)


def by_entropy(found):
    indices = [tuple(index) for index in np.argwhere(found.selected).tolist()]
    return sorted(indices, key=lambda index: (found.entropy[index], index))


def members(found):
    return [[tuple(index) for index in np.argwhere(mask).tolist()] for mask in found.mask]


def test_toy_1_all_neurons_in_the_last_domain():
    found = domain_neurons.select(toy(80, 11), np.array([100, 120, 80]), top_rate=0.10)
    assert (found.threshold, found.bar, found.k) == (0.825, 0.825, 4)
    assert np.isfinite(found.entropy).sum() == 6
    assert by_entropy(found) == [(0, 12), (0, 7), (1, 7), (1, 2)]
    np.testing.assert_allclose(
        [found.entropy[index] for index in by_entropy(found)],
        [0.896938, 0.898541, 0.937292, 0.962161],
        atol=5e-7,
    )
    assert members(found) == [[], [], sorted(by_entropy(found))]


def test_toy_2_an_empty_last_domain_keeps_its_place():
    found = domain_neurons.select(
        toy(97, 29), np.array([100, 100, 100]), top_rate=0.10, filter_rate=0.90, bar_rate=0.90
    )
    assert (found.threshold, found.k) == (0.87, 4)
    assert np.isfinite(found.entropy).sum() == 10
    assert by_entropy(found) == [(1, 11), (0, 10), (1, 3), (0, 5)]
    np.testing.assert_allclose(
        [found.entropy[index] for index in by_entropy(found)],
        [0.679411, 0.785000, 0.796702, 0.814949],
        atol=5e-7,
    )
    assert members(found) == [[(0, 5), (1, 3), (1, 11)], [(0, 10), (1, 3)], []]
    assert found.mask.shape == (3, 2, 20)


@st.composite
def problems(draw):
    domains = draw(st.integers(2, 6))
    shape = (domains, draw(st.integers(1, 4)), draw(st.integers(1, 12)))
    top = draw(st.sampled_from([1, 2, 3, 40, 10**6]))  # small ranges are full of ties
    counts = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, top)))
    for domain in draw(st.sets(st.integers(0, domains - 1))):
        counts[domain] = 0
    tokens = top + draw(hnp.arrays(np.int64, domains, elements=st.integers(0, 3)))
    rates = st.sampled_from([0.1, 0.25, 0.5, 0.85, 0.95, 1.0])
    return counts, tokens, (draw(rates), draw(rates), draw(rates))


@given(problems())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_equals_the_loop_transcription(problem):
    counts, tokens, rates = problem
    size = counts.size
    if 0 in (round(rates[1] * size), round(rates[2] * size)):
        with pytest.raises(ValueError, match="rounds to rank 0"):
            domain_neurons.select(
                counts, tokens, top_rate=rates[0], filter_rate=rates[1], bar_rate=rates[2]
            )
        return
    found = domain_neurons.select(
        counts, tokens, top_rate=rates[0], filter_rate=rates[1], bar_rate=rates[2]
    )
    tau, bar, k, raw, candidates, chosen, expected = transcription(counts, tokens, *rates)
    assert (found.threshold, found.bar, found.k) == (tau, bar, k)
    np.testing.assert_array_equal(domain_neurons.entropy(found.probability), raw)
    assert np.isfinite(found.entropy).sum() == len(candidates)
    assert by_entropy(found) == [(layer, j) for _, layer, j in chosen]
    assert members(found) == expected


def test_all_inactive_domains_select_nothing():
    found = domain_neurons.select(np.zeros((3, 2, 50), int), np.full(3, 10))
    assert not found.selected.any() and not found.mask.any()
    assert np.isinf(found.entropy).all()
    assert (domain_neurons.entropy(found.probability) == 0).all()


def test_fewer_candidates_than_k_selects_the_candidates():
    counts = np.zeros((2, 1, 10), int)
    counts[0, 0, 3] = 5
    found = domain_neurons.select(counts, np.full(2, 10), top_rate=0.5)
    assert found.k == 5
    assert members(found) == [[(0, 3)], []]
    assert found.entropy[0, 3] == 0 and np.signbit(found.entropy[0, 3]) == 0


def test_ties_go_by_layer_then_neuron():
    found = domain_neurons.select(
        np.broadcast_to(np.array([9, 1])[:, None, None], (2, 3, 4)), np.full(2, 10),
        top_rate=0.5, filter_rate=0.5, bar_rate=0.5,
    )  # fmt: skip
    assert by_entropy(found) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


def test_of_equal_entropies_the_most_active_neuron_comes_first():
    counts = np.zeros((2, 3, 4), int)
    counts[0] = [[1, 1, 1, 1], [5, 1, 1, 1], [1, 1, 9, 3]]
    found = domain_neurons.select(
        counts, np.full(2, 10), top_rate=0.25, filter_rate=0.5, bar_rate=0.5
    )
    assert by_entropy(found) == [(1, 0), (2, 2), (2, 3)]
    released = domain_neurons.select(
        counts, np.full(2, 10), top_rate=0.25, filter_rate=0.5, bar_rate=0.5, compat="official"
    )
    assert by_entropy(released) == [(0, 0), (0, 1), (0, 2)]


def test_ranks_round_half_to_even():
    counts = np.arange(2 * 1 * 5).reshape(2, 1, 5)
    found = domain_neurons.select(counts, np.full(2, 10), top_rate=0.5, filter_rate=0.25)
    assert found.k == 2  # round(2.5)
    assert found.threshold == 0.1  # round(2.5)-th smallest


def test_published_sizes():
    assert round(0.01 * 32 * 11008) == 3523  # the union of LAPE's published LLaMA-2-7B neurons
    counts = np.random.default_rng(0).integers(0, 1000, (5, 24, 4096))
    found = domain_neurons.select(counts, np.full(5, 1000))
    assert found.k == found.selected.sum() == 983


def test_accepts_jax_arrays():
    counts, tokens = toy(80, 11), np.array([100, 120, 80])
    found = domain_neurons.select(jax.numpy.asarray(counts), jax.numpy.asarray(tokens))
    np.testing.assert_array_equal(found.mask, domain_neurons.select(counts, tokens).mask)


def found_at_random():
    counts = np.random.default_rng(1).integers(0, 1000, (4, 6, 200))
    return domain_neurons.select(
        counts, np.full(4, 1000), top_rate=0.1, filter_rate=0.5, bar_rate=0.7
    )


@pytest.mark.parametrize(
    "key", [7, jax.random.key(7), jax.random.PRNGKey(7)], ids=["int", "key", "raw key"]
)
def test_random_like_matches_layers_and_domains(key):
    found = found_at_random()
    control = domain_neurons.random_like(found, key)
    assert control.dtype == bool and control.shape == found.mask.shape
    np.testing.assert_array_equal(control.sum(-1), domain_neurons.per_layer(found))
    np.testing.assert_array_equal(control, domain_neurons.random_like(found, key))
    assert (control != found.mask).any()


def test_random_like_depends_on_the_key_and_is_uniform():
    found = found_at_random()
    controls = np.stack([domain_neurons.random_like(found, seed) for seed in range(400)])
    assert (controls[0] != controls[1]).any()
    rate = domain_neurons.per_layer(found)[..., None] / found.mask.shape[-1]
    sigma = np.sqrt(rate * (1 - rate) / len(controls))
    z = (controls.mean(axis=0) - rate) / np.where(sigma > 0, sigma, 1)
    assert np.abs(z).max() < 5.5  # over 4800 neurons
    assert abs(z.std() - 1) < 0.1


def test_tables():
    found = domain_neurons.select(
        toy(97, 29), np.full(3, 100), top_rate=0.10, filter_rate=0.90, bar_rate=0.90
    )
    np.testing.assert_array_equal(domain_neurons.per_layer(found), [[1, 2], [1, 1], [0, 0]])
    np.testing.assert_array_equal(domain_neurons.domains_per_neuron(found), [0, 3, 1, 0])
    np.testing.assert_array_equal(
        domain_neurons.overlap(found), [[1, 1 / 4, 0], [1 / 4, 1, 0], [0, 0, 0]]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"counts": np.ones((1, 2, 3), int), "tokens": [5]}, "at least two domains, got 1"),
        ({"tokens": [5, 0]}, "domain 1 has 0 tokens"),
        ({"tokens": [5, 0], "names": ["cats", "dogs"]}, "domain 'dogs' has 0 tokens"),
        ({"tokens": [5, 5, 5]}, "tokens must be .2."),
        ({"counts": np.ones((2, 3), int)}, "counts must be .domains, layers, neurons."),
        ({"counts": np.ones((2, 0, 3), int)}, "counts must be"),
        ({"counts": np.ones((2, 2, 3))}, "must be integers"),
        ({"counts": np.full((2, 2, 3), -1)}, "negative"),
        ({"names": ["cats"]}, "1 names for 2 domains"),
        ({"top_rate": 0}, "top_rate=0 lies outside"),
        ({"filter_rate": 1.5}, "filter_rate=1.5 lies outside"),
        ({"bar_rate": float("nan")}, "bar_rate=nan lies outside"),
        ({"filter_rate": 0.01}, "filter_rate=0.01 of 12 values rounds to rank 0"),
    ],
)
def test_errors_say_what_and_where(change, message):
    arguments = {"counts": np.ones((2, 2, 3), int), "tokens": [5, 5], **change}
    with pytest.raises(ValueError, match=message):
        domain_neurons.select(arguments.pop("counts"), arguments.pop("tokens"), **arguments)


def modules():
    rng = np.random.default_rng(3)
    counts = {"lm": rng.integers(0, 900, (3, 4, 50)), "projector": rng.integers(0, 99, (3, 1, 30))}
    return counts, {"lm": np.full(3, 1000), "projector": np.full(3, 100)}


RATES = {"top_rate": 0.1, "filter_rate": 0.8, "bar_rate": 0.9}


def test_thresholds_by_module_are_those_of_each_alone():
    counts, tokens = modules()
    found = domain_neurons.select_modules(counts, tokens, **RATES)
    for module, one in found.items():
        alone = domain_neurons.select(counts[module], tokens[module], **RATES)
        np.testing.assert_array_equal(one.mask, alone.mask)
        assert (one.threshold, one.k) == (alone.threshold, alone.k)


def test_global_thresholds_are_those_of_all_neurons_together():
    counts, tokens = modules()
    found = domain_neurons.select_modules(counts, tokens, thresholds="global", **RATES)
    # one module of all, with tokens brought to one number
    flat = np.concatenate([counts["lm"].reshape(3, -1), 10 * counts["projector"].reshape(3, -1)], 1)
    alone = domain_neurons.select(flat[:, None], np.full(3, 1000), **RATES)
    got = np.concatenate([found[m].mask.reshape(3, -1) for m in counts], axis=1)
    np.testing.assert_array_equal(got, alone.mask[:, 0])
    for module, one in found.items():
        assert (one.threshold, one.bar, one.k) == (alone.threshold, alone.bar, 23)
        assert (
            one.mask.shape == counts[module].shape and one.entropy.shape == counts[module].shape[1:]
        )
    assert found["lm"].selected.sum() != round(0.1 * 200)


def test_thresholds_by_layer_are_those_of_each_layer_alone():
    counts, tokens = modules()
    found = domain_neurons.select_modules(counts, tokens, thresholds="layer", **RATES)["lm"]
    for layer in range(4):
        alone = domain_neurons.select(counts["lm"][:, [layer]], tokens["lm"], **RATES)
        np.testing.assert_array_equal(found.mask[:, [layer]], alone.mask)
        assert (found.threshold[layer], found.bar[layer]) == (alone.threshold, alone.bar)
    assert found.k == 20 and found.selected.sum(axis=-1).tolist() == [5, 5, 5, 5]
    with pytest.raises(ValueError, match="thresholds='row' is not one of"):
        domain_neurons.select_modules(counts, tokens, thresholds="row")


def test_single_assignment_keeps_the_most_probable_domain():
    counts, tokens = modules()
    rates = RATES | {"bar_rate": 0.5}
    many = domain_neurons.select(counts["lm"], tokens["lm"], **rates)
    single = domain_neurons.select(counts["lm"], tokens["lm"], assign="single", **rates)
    assert many.mask.sum(axis=0).max() > 1 and single.mask.sum(axis=0).max() == 1
    np.testing.assert_array_equal(single.mask.any(axis=0), many.mask.any(axis=0))
    at = np.argwhere(single.mask)
    best = counts["lm"].argmax(axis=0)
    assert all(best[layer, neuron] == domain for domain, layer, neuron in at)
    for wrong in ({"assign": "all"}, {"compat": "paper"}):
        with pytest.raises(ValueError, match="is neither"):
            domain_neurons.select(counts["lm"], tokens["lm"], **wrong)
