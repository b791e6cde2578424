"""Sites can be found by name, and addresses mean what NumPy's brackets mean."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax import sites as S
from mllm_jax.sites import Address, Selection

L, F = 4, 48
FEW = settings(max_examples=60, deadline=None)


def test_every_site_is_an_attribute_and_a_name():
    for site in S.TABLE:
        here = S
        for part in site.name.split("."):
            here = getattr(here, part)
        assert here is site is S.get(site.name)
        assert str(site) == site.name and site.module == site.name.split(".")[0]
        assert len(site.axes) in (3, 4) and site.about and site.hf


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("lm.mlp.akt", "lm.mlp.act"),
        ("lm.resid_pots", "lm.resid_post"),
        ("vison.embed", "vision.embed"),
    ],
)
def test_an_unknown_site_names_the_nearest(wrong, near):
    with pytest.raises(KeyError, match=f"unknown site '{wrong}'; nearest: .*{near}"):
        S.get(wrong)


def test_an_unknown_attribute_names_the_nearest():
    with pytest.raises(AttributeError, match=r"unknown site 'lm.mlp.akt'; nearest: .*lm\.mlp\.act"):
        _ = S.lm.mlp.akt
    with pytest.raises(AttributeError, match="unknown site 'logit'; nearest: .*logits"):
        _ = S.logit


def test_a_group_of_sites_has_no_address_but_attention():
    with pytest.raises(AttributeError, match="'lm.mlp' is a group of sites: gate, act"):
        S.lm.mlp[3]
    assert S.lm.attn[1:].site is S.lm.attn.mask
    assert Address.of(S.lm.attn).site is S.lm.attn.mask


sizes = st.integers(1, 9)
ends = st.none() | st.integers(-12, 12)


@FEW
@given(sizes, ends, ends, st.none() | st.integers(1, 4))
def test_slices_are_those_of_numpy(size, start, stop, step):
    item = slice(start, stop, step)
    want = np.zeros(size, bool)
    want[item] = True
    np.testing.assert_array_equal(Selection.parse(item).mask(size, "axis"), want)
    np.testing.assert_array_equal(Selection.parse(item).indices(size, "axis"), np.flatnonzero(want))


@FEW
@given(st.data())
def test_indices_and_masks_are_those_of_numpy(data):
    size = data.draw(sizes)
    index = data.draw(st.lists(st.integers(-size, size - 1), max_size=4))
    want = np.zeros(size, bool)
    want[np.array(index, int)] = True
    for item in (index, np.array(index, np.int64), want):
        np.testing.assert_array_equal(Selection.parse(item).mask(size, "axis"), want)
    got = Selection.parse(index).indices(size, "axis")  # their order and number are kept
    np.testing.assert_array_equal(got, np.arange(size)[np.array(index, int)])


@FEW
@given(st.data())
def test_an_address_is_layers_times_units(data):
    layers = data.draw(st.integers(-L, L - 1) | st.slices(L).filter(lambda s: (s.step or 1) > 0))
    units = data.draw(st.lists(st.integers(-F, F - 1)))
    want = np.zeros((L, F), bool)
    rows = np.zeros(L, bool)
    rows[layers] = True
    want[np.ix_(rows, np.isin(np.arange(F), np.array(units, int) % F))] = True
    np.testing.assert_array_equal(S.lm.mlp.act[layers, units].mask(L, F), want)
    np.testing.assert_array_equal(S.lm.mlp.act[layers].mask(L, F), rows[:, None])


def test_a_mask_of_layers_and_units():
    mask = np.random.default_rng(0).random((L, F)) < 0.3
    np.testing.assert_array_equal(S.lm.mlp.act[mask].mask(L, F), mask)
    np.testing.assert_array_equal(Address.of(mask).mask(L, F), mask)
    assert Address.of(mask).site is S.lm.mlp.act
    two = S.lm.mlp.act[1:3, mask].mask(L, F)  # of these layers only
    np.testing.assert_array_equal(two, mask & np.array([0, 1, 1, 0], bool)[:, None])


def test_the_address_of_a_site_without_layers_is_its_units():
    mask = S.projector.out[[2, -1]].mask(1, 5)
    np.testing.assert_array_equal(mask, [[0, 0, 1, 0, 1]])
    with pytest.raises(
        IndexError, match=r"projector.out exists once, not per layer: .* \[neurons\]"
    ):
        S.projector.out[0, 1]


def test_indices_may_be_traced():
    @jax.jit
    def masks(layer, units):
        return S.lm.mlp.act[layer, units].mask(L, F)

    want = np.zeros((L, F), bool)
    want[2, [1, 47]] = True
    np.testing.assert_array_equal(masks(2, np.array([1, -1])), want)
    assert masks._cache_size() == 1
    listed = jax.jit(lambda a, b: S.lm.mlp.act[[a], [1, b]].mask(L, F))  # lists that hold them
    np.testing.assert_array_equal(listed(2, -1), want)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: S.lm.mlp.act[7].mask(L, F), ValueError,
         r"lm.mlp.act: layer 7 is out of range: the model has 4 \(0 to 3\)"),
        (lambda: S.lm.mlp.act[0, [3, 48]].mask(L, F), ValueError,
         "lm.mlp.act: unit 48 is out of range: the model has 48"),
        (lambda: S.lm.mlp.act[-5].mask(L, F), ValueError, "layer -5 is out of range"),
        (lambda: S.lm.mlp.act[np.ones((L, 5), bool)].mask(L, F), ValueError,
         r"lm.mlp.act: the mask is \(4, 5\), the model has 4 layers of 48"),
        (lambda: S.lm.mlp.act[0, np.ones(5, bool)].mask(L, F), ValueError,
         "lm.mlp.act: unit mask has 5 entries, the model has 48"),
        (lambda: S.lm.mlp.act[np.ones((L, F), bool), 3], IndexError, "takes no second part"),
        (lambda: S.lm.mlp.act[0, 1, 2], IndexError, r"an address is lm.mlp.act\[layers, neurons\]"),
        (lambda: S.lm.mlp.act[1.5], TypeError, "integers, slices or masks, not float64"),
        (lambda: S.lm.mlp.act[::-1], ValueError, "the step must be positive"),
        (lambda: Address.of("lm.mlp.act"), TypeError, "expected a site such as sites.lm.mlp.act"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
