"""compat="official" against a transcription of the published procedure in torch."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest

from mllm_jax import sites
from mllm_jax.analysis import domain_neurons, official


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("domains", [2, 5])
def test_same_neurons_as_the_transcription(seed, domains):
    published = pytest.importorskip("tests.helpers.published")
    rng = np.random.default_rng([seed, domains])
    tokens = rng.integers(90_000, 110_000, domains)
    rate = rng.beta(0.3, 2.0, (domains, 8, 500))
    counts = rng.binomial(tokens[:, None, None], rate).astype(np.int32)
    expected, gap = published.select(counts, tokens, top=0.02)
    assert gap > 1e-6, "a tie at the boundary would be decided by nobody's rule"
    found = domain_neurons.select(counts, tokens, top_rate=0.02, compat="official")
    assert [[layer.tolist() for layer in d] for d in official.lists(found.mask)] == expected
    assert sum(len(layer) for layers in expected for layer in layers) > 50
    assert found.probability.dtype == np.float32


def test_in_float32_probabilities_tie_that_differ():
    counts = np.zeros((2, 1, 10), np.int64)
    counts[0, 0, 3:] = 16_777_217  # 2 ** 24 + 1 is no float32
    counts[0, 0, :3] = 16_777_216
    tokens = np.array([20_000_000, 20_000_000])
    rates = {"top_rate": 0.1, "filter_rate": 0.65, "bar_rate": 0.65}
    assert domain_neurons.select(counts, tokens, **rates).mask.sum() == 1
    assert domain_neurons.select(counts, tokens, **rates, compat="official").mask.sum() == 0


def test_too_few_candidates_are_filled_up():
    counts = np.zeros((2, 1, 10), int)
    counts[0, 0, 3] = 5
    default = domain_neurons.select(counts, np.full(2, 10), top_rate=0.5, bar_rate=0.9)
    filled = domain_neurons.select(
        counts, np.full(2, 10), top_rate=0.5, bar_rate=0.9, compat="official"
    )
    assert default.selected.sum() == 1 and filled.selected.sum() == 5
    assert np.flatnonzero(filled.selected).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(filled.mask, default.mask)


def test_lists_end_at_the_last_domain_that_has_neurons():
    mask = np.zeros((4, 2, 6), bool)
    mask[1, 0, [2, 5]] = True
    found = official.lists(mask)
    assert [[layer.tolist() for layer in layers] for layers in found] == [[[], []], [[2, 5], []]]
    assert found[0][0].dtype == np.int64
    assert official.lists(np.zeros((3, 2, 6), bool)) == []


def test_examples_counted():
    assert official.examples_counted([2885] * 100) == 35
    assert official.examples_counted([3 * 577] * 100) == 58
    assert official.examples_counted([257] * 1000) == 390
    assert official.examples_counted([50_000, 50_000, 1]) == 2
    with pytest.raises(ValueError, match="2885 vision tokens are fewer than 100000"):
        official.examples_counted([2885])
    with pytest.raises(
        ValueError, match="example 2 skips 100000: it leads from fewer tokens to 300000"
    ):
        official.examples_counted([99_999, 200_001])
    with pytest.raises(ValueError, match="10001 vision tokens are fewer"):
        official.examples_counted([1] * 200_000)


@pytest.mark.parametrize(
    "told, real",
    [
        ((), ()),
        (("lang",), ("lang",)),
        (("mmproj",), ()),
        (("vision",), ("vision", "mmproj")),
        (("lang", "vision", "mmproj"), ("lang", "vision", "mmproj")),
        (("encoder", "qformer"), ("encoder", "qformer", "query")),
    ],
)
def test_what_is_cut(told, real):
    assert official.ablated(told) == real


def test_names_and_limits():
    for name in official.SITES.values():
        sites.get(name)
    assert official.max_new_tokens(60) == 452 and official.max_new_tokens(2900) == 1
    with pytest.raises(ValueError, match="unknown module 'mmprj'"):
        official.ablated(["mmprj"])


def test_the_page_of_differences_runs(capsys):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "official.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(block, "official.md", "exec"), {})
    assert [int(word) for word in capsys.readouterr().out.split()][2] == 5
    for name in re.findall(r"`official\.(\w+)", page):
        assert hasattr(official, name), name
