"""Selectors pick the tokens that NumPy picks from the map, and padding never."""

from __future__ import annotations

import dataclasses
import operator

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax import tokens as tok

PAD = tok.CODE["pad"]


@pytest.fixture(scope="module")
def words(make_batch) -> tok.TokenMap:
    """Of two rows, two pictures in the first, padded."""
    return make_batch(images=(2, 1), words=(9, 6)).tokens


@pytest.fixture(scope="module")
def patches() -> tok.TokenMap:
    """Of three tiles of 2 x 3 patches and a CLS token; the last tile only fills up."""
    return tok.TokenMap.grid(np.array([0, 1, 0]), (2, 3), True, np.array([True, True, False]))


def test_steps_are_counted_from_the_prompt(words):
    """Padding on either side, two answers in a row, and what is added after the prompt."""
    s, q, a, p = (tok.CODE[name] for name in ("system", "question", "answer", "pad"))
    kind = np.array([[s, q, a, a, q, a, a, p], [p, p, s, q, q, a, p, p]], np.int8)
    map_ = dataclasses.replace(words, **{name: np.zeros((2, 8), np.int16) for name in vars(words)})
    map_ = dataclasses.replace(map_, kind=kind, added=0)
    want = np.array([[0, 0, 1, 2, 0, 1, 2, 2, 3, 4], [0, 0, 0, 0, 0, 1, 1, 1, 2, 3]])
    real = np.pad(kind != p, ((0, 0), (0, 2)), constant_values=True)
    for step in (map_.extended(2).step, jax.jit(lambda m: m.extended(2).step)(map_)):
        np.testing.assert_array_equal(np.asarray(step)[real], want[real])


def test_the_map_of_a_grid(patches):
    c, i, p = tok.CODE["cls"], tok.CODE["image"], PAD
    np.testing.assert_array_equal(patches.kind, [[c, *[i] * 6]] * 2 + [[p] * 7])
    np.testing.assert_array_equal(patches.row, [[-1, 0, 0, 0, 1, 1, 1]] * 3)
    np.testing.assert_array_equal(patches.column, [[-1, 0, 1, 2, 0, 1, 2]] * 3)
    np.testing.assert_array_equal(patches.tile[:, 3], [0, 1, 0])
    assert not patches.last.any()


@pytest.mark.parametrize("name", tok.KINDS[1:])
def test_every_kind(name, words, patches):
    for map_ in (words, patches):
        want = map_.kind == tok.CODE[name]
        np.testing.assert_array_equal(tok.NAMED[name].mask(map_), want)
        np.testing.assert_array_equal(tok.of(name).mask(map_), want)
    np.testing.assert_array_equal(getattr(tok, name).mask(words), words.kind == tok.CODE[name])


def test_groups_of_kinds(words):
    real = words.kind != PAD
    text = np.isin(words.kind, [tok.CODE[n] for n in ("system", "question", "answer")])
    np.testing.assert_array_equal(tok.every.mask(words), real)
    np.testing.assert_array_equal(tok.of(None).mask(words), real)
    np.testing.assert_array_equal(tok.text.mask(words), text)
    np.testing.assert_array_equal(tok.last.mask(words), words.last)
    assert not real.all() and text.any() and not text.all()  # the batch can tell them apart


@pytest.mark.parametrize("name", ["row", "column", "tile"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_rows_columns_tiles(name, at, words, patches):
    for map_ in (words, patches):
        want = (getattr(map_, name) == at) & (map_.kind != PAD)
        np.testing.assert_array_equal(getattr(tok, name)(at).mask(map_), want)


@pytest.mark.parametrize("make", [tok.row, tok.column, tok.tile])
def test_rows_count_from_zero(make):
    with pytest.raises(ValueError, match="=-1 is not a whole number from 0"):
        make(-1)  # what words have: it would mean all of them


def test_padding_is_never_selected(words):
    real = words.kind != PAD
    everything = tok.mask(np.ones(words.kind.shape, bool))
    np.testing.assert_array_equal(everything.mask(words), real)
    np.testing.assert_array_equal(
        (~tok.image).mask(words), real & (words.kind != tok.CODE["image"])
    )


leaves = st.sampled_from([tok.image, tok.question, tok.text, tok.last, tok.row(0), tok.tile(1)])
selectors = st.recursive(
    leaves,
    lambda inner: st.tuples(st.sampled_from("|&~"), inner, inner),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(selectors)
def test_and_or_not(words, selector):
    real = words.kind != PAD

    def both(s):
        """The selector, and what NumPy says it is among real tokens."""
        if isinstance(s, tok.Where):
            return s, s.mask(words)
        sign, (a, x), (b, y) = s[0], both(s[1]), both(s[2])
        if sign == "~":
            return ~a, ~x & real
        op = {"|": operator.or_, "&": operator.and_}[sign]
        return op(a, b), op(x, y)

    where, want = both(selector)
    np.testing.assert_array_equal(where.mask(words), want)


def test_a_map_may_be_traced(words):
    where = (tok.image & ~tok.row(0)) | tok.last
    np.testing.assert_array_equal(jax.jit(where.mask)(words), where.mask(words))


def test_kinds_are_data_not_structure():
    structures = {
        jax.tree.structure(where) for where in (tok.image, tok.text, tok.every, tok.system)
    }
    assert len(structures) == 1
    assert len({leaf.shape for leaf in jax.tree.leaves((tok.image, tok.text, tok.every))}) == 1


def test_an_index_may_be_traced(patches):
    mask = jax.jit(lambda at: tok.column(at).mask(patches))
    np.testing.assert_array_equal(mask(2), tok.column(2).mask(patches))


def test_generated_tokens_are_answers(words):
    longer = words.extended(3)
    np.testing.assert_array_equal(longer.kind[:, -3:], tok.CODE["answer"])
    for name, fill in {"row": -1, "column": -1, "tile": -1, "last": False}.items():
        np.testing.assert_array_equal(getattr(longer, name)[:, -3:], fill)
        np.testing.assert_array_equal(getattr(longer, name)[:, :-3], getattr(words, name))


def test_an_empty_row_generates_nothing(patches):
    longer = patches.extended(2)
    np.testing.assert_array_equal(longer.kind[:, -1], [tok.CODE["answer"]] * 2 + [PAD])
    np.testing.assert_array_equal(tok.answer.mask(longer)[2], False)


def test_selectors_are_combined_with_names_and_masks(words):
    some = np.random.default_rng(0).random(words.kind.shape) < 0.5
    real, image = words.kind != PAD, tok.image.mask(words)
    for where in (tok.image | "last", "last" | tok.image):
        np.testing.assert_array_equal(where.mask(words), image | tok.last.mask(words))
    for where in (~tok.image & some, some & ~tok.image):
        np.testing.assert_array_equal(where.mask(words), ~image & real & some)
    with pytest.raises(ValueError, match="is combined with another, not with None"):
        tok.image | None


def test_selectors_are_neither_true_nor_false():
    """`tok.image and tok.last` was `tok.last`, and `not tok.image` was False."""
    for combine in (
        lambda: tok.image and tok.last,
        lambda: tok.image or tok.last,
        lambda: not tok.image,
    ):
        with pytest.raises(ValueError, match="not a bool: combine selectors with &, |, ~"):
            combine()


@pytest.mark.parametrize("number", [1.5, "1", [1, 2], None, True, 2**40, np.ones(2, int)])
def test_a_place_is_one_whole_number(number):
    """1.5 was 1."""
    with pytest.raises(ValueError, match="tile=.* is not a whole number from 0"):
        tok.tile(number)


def test_errors(words):
    with pytest.raises(
        ValueError, match=r"the token mask is \(2, 3\), but the batch has tokens \(2, "
    ):
        tok.mask(np.ones((2, 3), bool)).mask(words)
    with pytest.raises(
        KeyError, match="unknown token kind 'imgae'; known: system, question, image"
    ):
        tok.of("imgae")
    with pytest.raises(TypeError, match=r"a token mask is bool\[B, T\], not int"):
        tok.mask(np.ones(words.kind.shape, int))


def test_a_traced_place_that_is_not_there_selects_nothing(words):
    pick = jax.jit(lambda index: tok.tile(index).mask(words))
    np.testing.assert_array_equal(pick(1), words.tile == 1)
    for index in (-1, 7, 2**16, 2**16 + 1, -(2**16)):  # -1 is what the map says of text
        assert not pick(index).any()
    with pytest.raises(ValueError, match="tile=-1 is not a whole number from 0"):
        tok.tile(jax.numpy.int32(-1))
