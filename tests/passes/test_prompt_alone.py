"""What is generated and scored depends on the prompt alone, whatever else the batch holds."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.families.llava_next.model import LlavaNextConfig
from mllm_jax.passes import score
from tests.helpers import tiny

MAKERS = {
    "llava": (tiny.processor, LlavaConfig.tiny()),
    "llava-next": (tiny.processor, LlavaNextConfig.tiny()),
    "instructblip": (tiny.instructblip_processor, InstructBlipConfig.tiny()),
}
PROMPTS, ANSWERS = ["what is shown ?", "which one is it ?"], ["a cat and a dog", "red"]
CANDIDATES = ["a cat", "red", "no dog and no cat"]
SHAPES = [(24, 40), (40, 24)]
WORDS = 6


@pytest.fixture(scope="module", params=MAKERS)
def family(request, random_model):
    make, config = MAKERS[request.param]
    return random_model(config), make(config)


@pytest.fixture(scope="module")
def pictures():
    return [tiny.picture(i, *shape) for i, shape in enumerate(SHAPES)]


def edits(config):
    """On the prompt's tokens, on its last and on what is said, which the answers are not."""
    v = np.random.default_rng(0).normal(size=config.lm.width).astype(np.float32)
    return (
        mj.ablate(S.lm.mlp.act[1, [1, 5, 9]], where=tok.image)
        >> mj.add(S.lm.resid_post[2], v, where=tok.answer)
        >> mj.add(S.lm.resid_post[1], -v, where=tok.generating)
        >> mj.knockout(S.lm.attn[1:], to=tok.answer, on=tok.system)
    )


CAPTURES = {"mean": mj.mean(S.lm.resid_post[2]), "fire": mj.stats(S.lm.mlp.act, by=tok.kind)}


def asked(model, batch, changes):
    """Scores with captures and receipts, and what is generated."""
    scores = score.score_with(model, batch, CANDIDATES, changes, CAPTURES)
    said = mj.generate(model, batch, changes, max_new_tokens=WORDS)
    return jax.tree.map(np.asarray, (scores, said.receipts)), np.asarray(said.tokens), said.text


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("edited", [pytest.param(False, marks=pytest.mark.slow), True])
def test_answers_in_the_batch_are_not_read(edited, family, pictures):
    model, processor = family
    changes = edits(model.config) if edited else None
    for left in (False, True):
        how = {"left": left, "length": 128, "rows": 3}
        alone = asked(model, processor(pictures, PROMPTS, **how), changes)
        told = asked(model, processor(pictures, PROMPTS, answers=ANSWERS, **how), changes)
        assert_same(told[0], alone[0])
        np.testing.assert_array_equal(told[1], alone[1])
        assert told[2] == alone[2]


def test_the_answers_would_be_seen(random_model, pictures):
    """In a pass over all of the batch, which reads them."""
    config = LlavaConfig.tiny()
    model, processor = random_model(config), tiny.processor(config)
    batch = processor(pictures, PROMPTS, answers=ANSWERS, length=128, rows=3)
    np.testing.assert_array_equal(batch.prompts().valid.sum(-1) < batch.valid.sum(-1), [1, 1, 0])
    states = (mj.run(model, b, None, CAPTURES)["mean"] for b in (batch, batch.prompts()))
    a, b = (np.asarray(s)[:2] for s in states)
    assert np.abs(a - b).max() > 1e-3


def test_packed_rows(family, pictures):
    """One question a row is read as it is alone; of several nobody knows which is meant."""
    model, processor = family
    turns, changes = [[pair] for pair in zip(PROMPTS, ANSWERS, strict=True)], edits(model.config)
    alone = asked(model, processor(pictures, PROMPTS, length=128, rows=3), changes)
    packed = asked(model, processor.pack(pictures, turns, length=128, rows=3), changes)
    assert_same(packed[0], alone[0])
    np.testing.assert_array_equal(packed[1], alone[1])
    several = processor.pack(pictures, [turns[0], turns[0] + turns[1]], length=256)
    for ask in (lambda: mj.generate(model, several), lambda: mj.score(model, several, CANDIDATES)):
        with pytest.raises(ValueError, match="row 1 holds 2 packed questions: generate and score"):
            ask()


def test_packed_rows_under_jit(random_model, pictures):
    config = LlavaConfig.tiny()
    model, processor = random_model(config), tiny.processor(config)
    batch = processor.pack(pictures, [[(p, "a")] for p in PROMPTS]).replace(processor=None)
    ids = score.candidate_ids(processor, CANDIDATES, 2)
    with pytest.raises(ValueError, match="packed rows inside a transformation of JAX"):
        jax.jit(lambda batch: mj.score(model, batch, ids))(batch)


def test_every_step_is_steered_at_the_tokens_that_generate(random_model, pictures):
    """`tok.last` is the last token of the prompt alone."""
    config = LlavaConfig.tiny()
    model, processor = random_model(config), tiny.processor(config)
    batch = processor(pictures, PROMPTS)
    site, v = S.lm.resid_post[2], np.ones(config.lm.width, np.float32)
    counts = {}
    for name in ("last", "answer", "generating"):
        said = mj.generate(model, batch, mj.add(site, v, where=tok.NAMED[name]), max_new_tokens=4)
        counts[name] = said.receipts[0].tokens[2]
    assert counts == {"last": 2, "answer": 6, "generating": 8}
