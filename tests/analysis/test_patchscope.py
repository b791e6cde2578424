"""Patchscopes: a state put into a target prompt, against patches between rows and single passes."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import patchscope
from mllm_jax.families.llava import model as llava
from tests.helpers import random_inputs

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PLACE = 5  # the token of the target that is replaced


@pytest.fixture(scope="module")
def model():
    lm = dataclasses.replace(random_inputs.TINY.lm, layers=3)
    vision = dataclasses.replace(random_inputs.TINY.vision, layers=2)
    return random_inputs.random_model(llava.LlavaConfig.of(vision, lm, fold=2, image_token=95))


@pytest.fixture(scope="module")
def two():
    """Two prompts of text; the second is the target."""
    return random_inputs.make_batch(images=(0, 0), words=(9, 9), fill=0)


@pytest.fixture(scope="module")
def target(two):
    return two.take(np.array([1]))


@pytest.fixture(scope="module")
def states(model, two):
    """What the tokens of the first prompt are after each layer, [L, T, D]."""
    return np.asarray(mj.run(model, two, None, {"x": mj.keep(S.lm.resid_post)})["x"])[:, 0]


def at(batch):
    return np.arange(batch.ids.shape[1])[None] == PLACE


def test_words_are_those_of_a_patch_between_rows_in_one_program_for_all_layers(
    model, two, target, states
):
    mask = at(target)
    found = {}
    compiled = []
    for layer in (0, 2, 1):
        state = states[layer, PLACE : PLACE + 1]
        found[layer] = patchscope.next_words(model, state, target, layer=layer, where=mask, k=4)
        compiled.append(mj.compiles())
    assert len(set(compiled)) == 1
    for layer, words in found.items():
        patch = mj.patch(S.lm.resid_post[layer], 0, 1, where=np.repeat(mask, 2, 0))
        logits = mj.run(model, two, patch).logits[1]
        want = np.asarray(jax.nn.log_softmax(logits))
        order = np.argsort(-want, kind="stable")[:4]
        assert words.ids[0].tolist() == order.tolist()
        np.testing.assert_allclose(words.log_probs[0], want[order], atol=1e-5)
    assert (found[0].log_probs != found[1].log_probs).any()


@pytest.mark.slow
def test_what_is_said_is_what_single_passes_say_one_after_the_other(model, target, states):
    given = states[[0, 1, 1, 2, 0], [3, 4, 8, 6, 7]] * 3
    layers = np.array([2, 0, 1, 0, -1])
    where = at(target) | tok.last.mask(target.tokens)  # two tokens are the state
    options = {"where": where, "max_new_tokens": 3}
    said = patchscope.say(model, given, target, layer=layers, rows=2, **options)
    assert said.tokens.shape == (5, 3) and said.text is None
    for state, layer, tokens in zip(given, layers, said.tokens, strict=True):
        for step in range(3):
            read = tokens[None, :step]
            batch = target.followed_by(read, np.ones(read.shape, bool)) if step else target
            mask = np.pad(where, ((0, 0), (0, step)))
            put = mj.replace(S.lm.resid_post[layer], state, where=mask)
            out = mj.run(model, batch, put, logits="all")
            assert tokens[step] == out.logits[0, where.shape[1] + step - 1].argmax()
    clean = np.asarray(mj.generate(model, target, max_new_tokens=3).tokens)
    assert (said.tokens != clean).any(1).sum() > 2
    own = mj.run(model, target, None, {"x": mj.keep(S.lm.resid_post[1])})["x"][0, PLACE]
    options["where"] = at(target)
    again = patchscope.say(model, own[None], target, layer=1, **options)
    np.testing.assert_array_equal(again.tokens, clean)


class Words:
    """A processor, as far as it names tokens."""

    def __init__(self, words):
        self._words = words

    def word(self, token):
        return self._words[token]


def test_the_place_is_the_last_token_with_the_text(target):
    ids = np.asarray(target.ids)[0]
    asked = np.flatnonzero(np.asarray(tok.question.mask(target.tokens))[0])
    assert len(asked) > 3
    words = {int(i): "a" for i in ids}
    words[int(ids[asked[1]])] = words[int(ids[asked[2]])] = " x?"
    named = target.replace(processor=Words(words))
    found = patchscope.place(named, "?")
    last = [i for i in asked if "?" in words[int(ids[i])]][-1]
    assert found.shape == target.ids.shape and np.flatnonzero(found[0]).tolist() == [last]
    with pytest.raises(ValueError, match="no token of the target has 'z' in it"):
        patchscope.place(named, "z")
    with pytest.raises(ValueError, match="has no processor"):
        patchscope.place(target)


def test_what_does_not_fit_is_refused(model, two, target, states):
    x = states[0]
    for call, says in (
        (lambda: patchscope.say(model, x, two, layer=0), "the target has 2 rows"),
        (
            lambda: patchscope.say(model, x[:, :5], target, layer=0),
            r"states are \[\d+, 5\], expected",
        ),
        (lambda: patchscope.say(model, x[:0], target, layer=0), "one or more"),
        (
            lambda: patchscope.say(model, x, target, layer=3),
            "layer=3: the language model has 3, 0 to 2",
        ),
        (lambda: patchscope.say(model, x, target, layer=[0, 1]), "one for each of the"),
        (lambda: patchscope.say(model, x * np.nan, target, layer=0), "states.*finite"),
        (
            lambda: patchscope.next_words(model, x, target, layer=0, k=97),
            "the vocabulary has 96 words",
        ),
        (
            lambda: patchscope.next_words(model, x, target, layer=0, where=tok.image),
            "selects no token of this batch",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            call()
