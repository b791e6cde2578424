"""A packed batch taken apart: the rows of the prompts alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import sites, tokens
from mllm_jax.analysis import direct_logits
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.families.llava_next.model import LlavaNextConfig
from tests.helpers import tiny
from tests.helpers.random_inputs import random_model

TURNS = [
    [("what is shown ?", "a cat"), ("which ?", "red"), ("is it ?", "no")],
    [("which ?", "blue")],
    [("is it ?", "yes"), ("what is shown ?", "a cat")],
]
CONFIGS = {"llava": LlavaConfig, "llava_next": LlavaNextConfig, "instructblip": InstructBlipConfig}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """The processor, the packed batch, and the batch of the prompts alone."""
    config = CONFIGS[request.param].tiny()
    instructblip = request.param == "instructblip"
    processor = (tiny.instructblip_processor if instructblip else tiny.processor)(config)
    pictures = [tiny.picture(n, 24 + 8 * n, 40) for n in range(3)]
    packed = processor.pack(pictures, TURNS, rows=4)
    images = [picture for picture, pairs in zip(pictures, TURNS, strict=True) for _ in pairs]
    questions, answers = zip(*itertools.chain(*TURNS), strict=True)
    alone = processor(images, questions, answers=answers)
    return processor, packed, alone


def test_each_row_has_the_tokens_of_its_prompt_alone(case):
    processor, packed, alone = case
    rows = processor.unpack(packed)
    assert rows.segment is None and packed.segment is not None
    for name in ("ids", "position", "labels", "last"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(alone, name), err_msg=name)
    for name in ("kind", "row", "column", "tile", "last"):
        ours, theirs = getattr(rows.tokens, name), getattr(alone.tokens, name)
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        assert ours.dtype == theirs.dtype


def test_each_row_reads_the_pictures_of_its_prompt_alone(case):
    """Through everything: the vision tower, a Q-Former's text and the language model."""
    processor, packed, alone = case
    model = random_model(processor.config)
    read = {"image": mj.keep(sites.lm.embed)}
    rows, want = (mj.run(model, b, None, read) for b in (processor.unpack(packed), alone))
    np.testing.assert_allclose(rows.logits, want.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows["image"], want["image"], rtol=0, atol=1e-5)


def test_the_rows_of_an_unpacked_batch_continue(case):
    processor, packed, alone = case
    model = nnx.eval_shape(lambda: processor.config.build(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"processor\.unpack"):
        mj.generate(model, packed, max_new_tokens=2)
    unpacked = processor.unpack(packed).prompts()
    np.testing.assert_array_equal(unpacked.tokens.kind, alone.prompts().tokens.kind)


def test_each_question_of_a_row_has_a_last_token(case):
    """That of the first alone was selected, and read where the last logits are asked for."""
    processor, packed, alone = case
    model = random_model(processor.config)
    last = tokens.last.mask(packed.tokens)
    np.testing.assert_array_equal(last.sum(-1), [*map(len, TURNS), 0])
    want = mj.run(model, alone).logits
    got = mj.run(model, packed, logits="all").logits[last]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    for read in (
        mj.run,
        lambda *given: mj.sweep(len, *given, [mj.ablate(sites.lm.mlp.act)]),
        lambda *given: direct_logits.attribute(*given, 3),
    ):
        with pytest.raises(ValueError, match='row 0 holds several .*, and logits="last" are of on'):
            read(model, packed)


@pytest.mark.parametrize("questions", [("what ?", "\nwhat ?"), ("\nwhat ?", "what ?")])
def test_a_token_of_the_template_and_the_question(questions):
    """A line end that begins a question is one token with that of the template."""
    processor = tiny.processor(LlavaConfig.tiny(), lines=("\n", "\n\n"))
    packed = processor.pack([tiny.picture(0)], [[(question, "a cat") for question in questions]])
    alone = processor([tiny.picture(0)] * 2, questions, answers=["a cat"] * 2)
    rows = processor.unpack(packed)
    np.testing.assert_array_equal(rows.ids, alone.ids)
    np.testing.assert_array_equal(rows.position, alone.position)
    np.testing.assert_array_equal(rows.tokens.kind, alone.tokens.kind)
    images = ((b.tokens.kind == mj.tokens.CODE["image"]).sum() for b in (packed, alone))
    assert 2 * next(images) == next(images), "the picture is not shared"


def test_a_batch_that_is_not_packed_is_refused(case):
    processor, _, alone = case
    with pytest.raises(ValueError, match="not packed"):
        processor.unpack(alone)


def test_a_batch_knows_whether_rows_read_the_tiles_of_others(tiny_config, tiny_model):
    """Also where the number of rows divides that of tiles."""
    processor = tiny.processor(tiny_config)
    pairs = [[tiny.picture(2 * i), tiny.picture(2 * i + 1)] for i in range(4)]
    shared = processor(pairs * 2, ["what ?"] * 8)
    assert len(shared.tile) == len(shared.ids) and shared.shares_tiles
    assert not processor(pairs, ["what ?"] * 4).shares_tiles
    unshared = tiny_model.unshared(shared)
    assert not unshared.shares_tiles and len(unshared.tile) == 16
    turns = [[("what ?", "a cat"), ("a dog ?", "no")], [("is it ?", "yes")] * 2]
    assert processor.unpack(processor.pack(pairs[:2], turns)).shares_tiles
