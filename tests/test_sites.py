"""Sites can be found by name, and addresses mean what NumPy's brackets mean."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax import sites as S
from mllm_jax.sites import Address

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
    with pytest.raises(AttributeError, match="'lm.mlp' is a group of sites: input, gate, act"):
        S.lm.mlp[3]
    assert S.lm.attn[1:].site is S.lm.attn.mask
    assert Address.of(S.lm.attn).site is S.lm.attn.mask


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


def test_pairs_are_single_units_of_single_layers():
    want = np.zeros((L, F), bool)
    want[[0, 1, -1], [5, 6, -2]] = True
    listed = S.lm.mlp.act[[(0, 5), (1, 6), (-1, -2)]]
    for address in (listed, S.lm.mlp.act[np.argwhere(want)], S.lm.mlp.act[want]):
        np.testing.assert_array_equal(address.mask(L, F), want)
    traced = jax.jit(lambda pairs: S.lm.mlp.act[pairs].mask(L, F))
    np.testing.assert_array_equal(traced(np.argwhere(want)), want)
    there = np.zeros((L, F), bool)
    there[2, 3] = True
    beyond = [(2, 3), (L, 1), (1, F), (-L - 1, 0), (0, -F - 1)]
    np.testing.assert_array_equal(traced(np.array(beyond)), there)


@pytest.mark.filterwarnings("error")
def test_two_lists_are_their_product():
    """NumPy would read two of one length as pairs, so that a warning says what they are."""
    want = np.zeros((L, F), bool)
    want[np.ix_([0, 2], [5, 6])] = True
    np.testing.assert_array_equal(S.lm.mlp.act[np.ix_([0, 2], [5, 6])].mask(L, F), want)
    np.testing.assert_array_equal(S.lm.mlp.act[0:3:2, [5, 6]].mask(L, F), want)
    one = np.zeros((L, F), bool)
    one[[0, 2], 5] = True
    for units in (5, [5]):  # of one unit both readings are the same
        np.testing.assert_array_equal(S.lm.mlp.act[[0, 2], units].mask(L, F), one)
    np.testing.assert_array_equal(S.lm.mlp.act[np.ix_([0, 2], [5])].mask(L, F), one)
    three = S.lm.mlp.act[[0, 2], [5, 6, 7]].mask(L, F)
    assert np.argwhere(three).tolist() == [[a, b] for a in (0, 2) for b in (5, 6, 7)]
    for make in (lambda a: S.lm.mlp.act[[0, 1], a], lambda a: S.lm.mlp.act[(0, 3), a]):
        with pytest.warns(UserWarning, match=r"two lists of 2 means each .*np.ix_\(layers") as said:
            got = make([5, 6])
        assert said[0].filename == __file__
        np.testing.assert_array_equal(got.layers.mask(L, "")[:, None], got.mask(L, F)[:, 5:6])
        assert got.mask(L, F).sum() == 4


def test_a_traced_index_out_of_range_selects_nothing():
    mask = jax.jit(lambda layer, units: S.lm.mlp.act[layer, units].mask(L, F))
    for layer, units in ((L, [0, 1]), (-L - 1, [0, 1]), (0, [F, -F - 1]), (2**30, [0, 0])):
        assert not mask(layer, np.array(units)).any()
    want = np.zeros((L, F), bool)
    want[-1, [2, -2]] = True
    np.testing.assert_array_equal(mask(-1, np.array([2, -2, F, -F - 1])), want)
    some = jax.jit(lambda low, high: S.lm.resid_post[low:high].mask(L, F)[:, 0])
    for low, high in ((1, 3), (-2, 9), (3, 1), (-9, 2), (4, 9)):
        np.testing.assert_array_equal(some(low, high), np.isin(range(L), np.arange(L)[low:high]))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: S.lm.mlp.act[[(0, 5), (L, 6)]].mask(L, F), ValueError, "layer 4 is out of range"),
        (lambda: S.lm.mlp.act[[(0, 5), (1, F)]].mask(L, F), ValueError, "unit 48 is out of range"),
        (lambda: S.lm.mlp.act[[(0, 5)], 3], IndexError, r"pairs int\[n, 2\] stands alone"),
        (lambda: S.lm.mlp.act[np.zeros((3, 3), int)], IndexError, r"shape \(3, 3\): integers are"),
        (lambda: S.projector.out[[(0, 5)]], IndexError, "exists once, not per layer"),
        (lambda: S.lm.mlp.act[[(0, 5)]].units.indices(F, "lm.mlp.act: unit"), ValueError,
         "the same units in every layer, not pairs"),
        (lambda: S.lm.mlp.act[7].mask(L, F), ValueError,
         r"lm.mlp.act: layer 7 is out of range: the model has 4 \(0 to 3\)"),
        (lambda: S.lm.mlp.act[0, [3, 48]].mask(L, F), ValueError,
         "lm.mlp.act: unit 48 is out of range: the model has 48"),
        (lambda: S.lm.mlp.act[-5].mask(L, F), ValueError, "layer -5 is out of range"),
        (lambda: S.lm.mlp.act[np.ones((L, 5), bool)].mask(L, F), ValueError,
         r"lm.mlp.act: the mask is \(4, 5\), the model has 4 layers of 48"),
        (lambda: S.lm.mlp.act[0, np.ones(5, bool)].mask(L, F), ValueError,
         "lm.mlp.act: unit mask has 5 entries, but the model has 48"),
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
