from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.analysis import domain_neurons, selectors
from mllm_jax.report import figures

D, L, F, N = 3, 2, 40, 24
RNG = np.random.default_rng(0)
COUNTS = RNG.binomial(1000, RNG.beta(0.5, 1.5, (D, L, F)))
TOKENS = np.array([1000, 1000, 1000])
labels = np.arange(N) % D


def test_entropy_is_the_selection_of_the_paper():
    rates = {"filter_rate": 0.8, "bar_rate": 0.9}
    found = domain_neurons.select(COUNTS, TOKENS, top_rate=0.1, **rates)
    scores = selectors.entropy(COUNTS, TOKENS, **rates)
    mask = selectors.top(scores, found.mask.sum(axis=(1, 2)))
    np.testing.assert_array_equal(mask, found.mask)
    assert found.mask.sum() >= 4


def test_auroc_counts_pairs():
    responses = RNG.integers(0, 6, (N, L, F)).astype(float)  # full of ties
    found = selectors.auroc(responses, labels)
    for d in range(D):
        inside, outside = responses[labels == d], responses[labels != d]
        wins = (inside[:, None] > outside[None]).mean(axis=(0, 1))
        ties = (inside[:, None] == outside[None]).mean(axis=(0, 1))
        np.testing.assert_allclose(found[d], wins + ties / 2, rtol=0, atol=1e-12)


def test_aura_gain():
    np.testing.assert_allclose(selectors.aura_gain([0.0, 0.5, 0.75, 1.0]), [1, 1, 0.5, 0])


def test_mean_difference_is_cohens_d():
    values = RNG.normal(size=(N, L, F)) + labels[:, None, None] * np.arange(F)
    sums = np.stack([values[labels == d].sum(axis=0) for d in range(D)])
    squares = np.stack([(values[labels == d] ** 2).sum(axis=0) for d in range(D)])
    tokens = np.bincount(labels)
    plain = selectors.mean_difference(sums, None, tokens)
    standard = selectors.mean_difference(sums, squares, tokens)
    for d in range(D):
        inside, outside = values[labels == d], values[labels != d]
        gap = inside.mean(axis=0) - outside.mean(axis=0)
        variance = (inside.var(axis=0) * len(inside) + outside.var(axis=0) * len(outside)) / N
        np.testing.assert_allclose(plain[d], gap, atol=1e-12)
        np.testing.assert_allclose(standard[d], gap / np.sqrt(variance), rtol=1e-9)


def test_weight_change():
    before = np.array([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]])
    after = np.array([[[5.0, 0.0], [3.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_allclose(selectors.weight_change(before, [after]), [[[0, 1, 0, 1]]])
    tiny = before + 1e-9 * after[..., ::-1]
    assert 0 < selectors.weight_change(before, [tiny])[0, 0, 0] < 1e-16


def test_attribution_is_of_its_size_not_its_sign():
    attributions = np.zeros((N, L, F))
    attributions[labels == 1, 0, 7] = RNG.choice([-1.0, 1.0], N // D)
    scores = selectors.attribution(attributions, labels)
    assert scores[:, 0, 7].tolist() == [-0.5, 1.0, -0.5]
    assert np.count_nonzero(scores) == 3


def test_every_selector_finds_a_planted_neuron():
    fired = RNG.random((N, 10, L, F)) < 0.3  # on 10 tokens of each example
    fired[:, :, 1, 5] = (labels == 2)[:, None]
    sums = np.stack([fired[labels == d].sum(axis=(0, 1)) for d in range(D)])
    tokens = 10 * np.bincount(labels)
    weights = RNG.normal(size=(L, F, 8))
    trained = np.stack([weights] * D) + 0.01 * RNG.normal(size=(D, L, F, 8))
    trained[2, 1, 5] = -weights[1, 5]
    found = {
        "entropy": selectors.entropy(sums, tokens, filter_rate=0.8, bar_rate=0.8),
        "AUROC": selectors.auroc(fired.max(axis=1).astype(float) + fired.mean(axis=1), labels),
        "mean": selectors.mean_difference(sums, sums, tokens),
        "weights": selectors.weight_change(weights, trained),
        "attribution": selectors.attribution(fired.mean(axis=1), labels),
    }
    for name, scores in found.items():
        assert scores.shape == (D, L, F)
        assert np.argwhere(selectors.top(scores, [0, 0, 1])).tolist() == [[2, 1, 5]], name


def few_examples(rng):
    """Responses of 8 examples, which tell many neurons apart without an error; counts alike."""
    domain = np.arange(8) % 2
    responses = rng.normal(size=(8, 4, 60)) + 2.5 * domain[:, None, None]
    counts = np.round(100 / (1 + np.exp(-responses))).astype(int)
    return responses, counts, domain


def selections(responses, counts, domain, weights, trained):
    """The neurons that every selector that looks at the data takes."""
    pooled = np.stack([counts[domain == d].sum(axis=0) for d in range(2)])
    tokens = 100 * np.bincount(domain)
    sums = np.stack([responses[domain == d].sum(axis=0) for d in range(2)])
    size = selectors.effect_size(responses, domain)
    rates = {"filter_rate": 0.5, "bar_rate": 0.5}
    return {
        "entropy": domain_neurons.select(pooled, tokens, top_rate=0.1, **rates).mask,
        "entropy score": selectors.top(selectors.entropy(pooled, tokens, **rates), 9, ties=size),
        "auroc": selectors.top(selectors.auroc(responses, domain), 9, ties=size),
        "difference": selectors.top(selectors.mean_difference(sums, None, tokens), 9),
        "attribution": selectors.top(selectors.attribution(responses, domain), 9),
        "weights": selectors.top(selectors.weight_change(weights, trained), 9),
    }


@pytest.mark.parametrize("seed", range(5))
def test_units_in_another_order_give_the_same_neurons(seed):
    rng = np.random.default_rng(seed)
    responses, counts, domain = few_examples(rng)
    weights, trained = rng.normal(size=(4, 60, 8)), rng.normal(size=(2, 4, 60, 8))
    layers, units = rng.permutation(4), rng.permutation(60)

    def moved(array, lead):
        return np.take(np.take(array, layers, axis=lead), units, axis=lead + 1)

    first = selections(responses, counts, domain, weights, trained)
    second = selections(
        moved(responses, 1), moved(counts, 1), domain, moved(weights, 0), moved(trained, 1)
    )
    area = selectors.auroc(responses, domain)
    assert (area[1] == 1).sum() > 18  # more than are selected
    for name, mask in first.items():
        np.testing.assert_array_equal(moved(mask, 1), second[name], err_msg=name)
        assert mask.any()
    by_place = selectors.top(area, 9)
    assert by_place[1].any(axis=1).sum() < first["auroc"][1].any(axis=1).sum()


def test_effect_size_is_in_standard_deviations():
    rng = np.random.default_rng(0)
    responses, _, domain = few_examples(rng)
    found = selectors.effect_size(responses, domain)
    gap = responses[domain == 1].mean(axis=0) - responses[domain == 0].mean(axis=0)
    variance = (responses[domain == 1].var(axis=0) + responses[domain == 0].var(axis=0)) / 2
    np.testing.assert_allclose(found[1], gap / np.sqrt(variance), rtol=1e-9)
    np.testing.assert_allclose(found[0], -found[1])


def test_top_takes_the_higher_of_equal_scores_by_ties():
    scores = np.array([[[1.0, 3.0, 3.0], [3.0, -np.inf, 3.0]]])
    ties = np.array([[[9.0, 1.0, 2.0], [3.0, 9.0, 2.0]]])
    assert np.argwhere(selectors.top(scores, 2, ties=ties))[:, 1:].tolist() == [[0, 2], [1, 0]]
    assert selectors.top(scores, 6, ties=ties).sum() == 5
    with pytest.raises(ValueError, match="ties must be of the shape"):
        selectors.top(scores, 1, ties=ties[:, :1])


def test_top():
    scores = np.array([[[1.0, 3.0, 3.0], [3.0, -np.inf, 0.0]]])
    assert np.argwhere(selectors.top(scores, 2))[:, 1:].tolist() == [[0, 1], [0, 2]]
    assert np.argwhere(selectors.top(scores, 3))[:, 1:].tolist() == [[0, 1], [0, 2], [1, 0]]
    assert selectors.top(scores, 6).sum() == 5  # never -inf
    assert np.argwhere(selectors.top(scores, 1, per_layer=True))[:, 1:].tolist() == [[0, 1], [1, 0]]
    assert selectors.top(np.zeros((2, 1, 4)), [1, 3]).sum(axis=(1, 2)).tolist() == [1, 3]


def test_random_is_seeded_and_uniform():
    first = selectors.random((D, L, F), 1)
    np.testing.assert_array_equal(first, selectors.random((D, L, F), 1))
    assert (first != selectors.random((D, L, F), 2)).all()
    often = sum(selectors.top(selectors.random((1, 2, 5), s), 3) for s in range(2000))
    assert np.abs(often / 2000 - 0.3).max() < 0.05


def test_overlap():
    masks = {name: np.zeros((2, 1, 10), bool) for name in ("a", "b", "c")}
    masks["a"][0, 0, :4] = masks["b"][0, 0, 2:6] = True
    masks["c"][1, 0, :5] = True
    found = selectors.overlap(masks)
    np.testing.assert_allclose(found.jaccard[0], [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]])
    assert found.chance[0, 0, 1] == pytest.approx(1.6 / 6.4)  # 4 * 4 / 10 shared of 8 - 1.6
    assert found.selectors_per_neuron.tolist() == [[4, 4, 2, 0], [5, 5, 0, 0]]
    rows = found.rows(["x", "y"])
    assert rows[0] == ("x", "a", "b", pytest.approx(1 / 3), pytest.approx(0.25))
    assert len(rows) == 6


def test_random_sets_overlap_as_chance_says():
    pairs = [
        selectors.overlap(
            {s: selectors.top(selectors.random((1, 4, 250), 2 * i + s), 100) for s in (0, 1)}
        )
        for i in range(200)
    ]
    assert np.mean([p.jaccard[0, 0, 1] for p in pairs]) == pytest.approx(
        pairs[0].chance[0, 0, 1], rel=0.05
    )


def test_overlap_is_ready_for_the_figure():
    masks = {str(i): selectors.top(selectors.random((D, L, F), i), 20) for i in range(3)}
    found = selectors.overlap(masks)
    domains = ("photographs", "documents", "maps")
    figure = figures.overlap(
        dict(zip(domains, found.jaccard)), dict(zip(domains, found.selectors_per_neuron)),
        found.names, members="selectors that take a neuron",
    )  # fmt: skip
    names = [ax.get_xlabel() for ax in figure.axes]
    assert names.count("selectors that take a neuron") == D


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: selectors.top(np.zeros((2, 3)), 1), "three axes"),
        (lambda: selectors.top(np.zeros((2, 1, 3)), 4), "between 0 and the 3 neurons"),
        (
            lambda: selectors.top(np.full((1, 1, 2), np.nan), 1),
            r"scores\[0, 0, 0\] is not a number",
        ),
        (
            lambda: selectors.auroc(np.zeros((4, 1, 2)), np.array([0, 0, 2, 2])),
            "every domain from 0",
        ),
        (lambda: selectors.auroc(np.zeros((4, 1, 2)), np.zeros(4)), "4 integers"),
        (
            lambda: selectors.mean_difference(np.zeros((2, 1, 2)), None, [3, 0]),
            "2 positive numbers",
        ),
        (lambda: selectors.weight_change(np.zeros((1, 2, 3)), [np.zeros((1, 2, 4))]), "alike"),
        (lambda: selectors.overlap({"a": np.zeros((1, 1, 2), bool)}), "two or more masks"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
