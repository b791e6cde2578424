"""What is counted are questions: batching and shared pictures change no number."""

from __future__ import annotations

import functools
import types

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.instructblip import model as instructblip
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.interventions import forms
from tests.helpers import tiny

SIZES = ((24, 24), (24, 70), (60, 20))  # LLaVA-NeXT cuts these into 2, 3 and 4 tiles
PICTURES = [tiny.picture(i, *size) for i, size in enumerate(SIZES)]
QUESTIONS = (  # pictures and words; several ask about one picture
    ([0], "what is shown ?"),
    ([1], "a cat or dog ?"),
    ([0], "a ship ?"),
    ([0, 2], "which one is left ?"),
    ([0], "what is shown ?"),
    ([1], "it ?"),
)
VISION = {"vision": S.vision.mlp.act, "projector": S.projector.act}
QFORMER = {"vision": S.vision.mlp.act, "text": S.qformer.mlp.act, "query": S.qformer.query_mlp.act}


def _llava():
    config = llava.LlavaConfig.tiny()
    return config, tiny.processor(config), VISION


def _next():
    config = llava_next.LlavaNextConfig.tiny()
    return config, tiny.processor(config), VISION


def _instructblip():
    config = instructblip.InstructBlipConfig.tiny()
    return config, tiny.instructblip_processor(config), QFORMER


FAMILIES = {"llava": _llava, "llava_next": _next, "instructblip": _instructblip}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, random_model):
    config, processor, sites = FAMILIES[request.param]()
    asked = {name: mj.stats(site, by=tok.kind) for name, site in sites.items()} | {
        "lens": mj.lens(S.projector.out, by=tok.kind),
        "mean": mj.mean(S.projector.out, where=tok.image),
        "tower": mj.mean(S.vision.resid_post),
    }
    model = random_model(config)
    one = _run(model, processor, asked)
    alone = functools.cache(lambda number: one([number], rows=1))
    return types.SimpleNamespace(
        config=config, model=model, run=one, processor=processor, sites=sites, alone=alone
    )


def _run(model, processor, asked):
    def run(numbers, rows):
        return jax.tree.map(np.asarray, mj.run(model, read(processor, numbers, rows), None, asked,
                                               logits="none").captures)  # fmt: skip

    return run


def read(processor, numbers, rows):
    pictures, prompts = zip(*(QUESTIONS[i] for i in numbers), strict=True)
    pictures = [[PICTURES[i] for i in shown] for shown in pictures]
    return processor(pictures, list(prompts), rows=rows, length=128)


def batchings(seed, rows):
    """The questions in a random order, in batches of at most so many, and some filled up."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(QUESTIONS)).tolist()
    while order:
        size = int(rng.integers(1, rows + 1))
        yield order[:size]
        order = order[size:]


def check(family, batches, rows):
    found = [family.run(numbers, rows) for numbers in batches]
    alone = [family.alone(number) for numbers in batches for number in numbers]
    for name in family.sites:
        total, want = (_sum([part[name] for part in parts]) for parts in (found, alone))
        np.testing.assert_array_equal(total.positive, want.positive, err_msg=name)
        np.testing.assert_array_equal(total.tokens, want.tokens, err_msg=name)
        for field in ("sum", "centred", "max"):
            ours, theirs = getattr(total, field), getattr(want, field)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=name)
    for numbers, part in zip(batches, found, strict=True):
        for row, number in enumerate(numbers):
            own = family.alone(number)
            for name, axis in {"mean": 0, "tower": 1}.items():
                ours, theirs = np.take(part[name], row, axis), np.take(own[name], 0, axis)
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(part["lens"].tokens[row], own["lens"].tokens[0])
            for field in ("sum", "top"):
                ours, theirs = getattr(part["lens"], field)[row], getattr(own["lens"], field)[0]
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert len(part["mean"]) == part["tower"].shape[1] == rows
        assert not part["mean"][len(numbers) :].any()  # rows that only fill up
        assert not part["lens"].tokens[len(numbers) :].any()


def _sum(parts):
    total = parts[0].wide()
    for part in parts[1:]:
        total = total.merge(part.wide())
    return total


def test_a_shared_picture_counts_for_each_question(family):
    """Two pictures, one of which three rows share: as alone, exactly."""
    shared = read(family.processor, [0, 1, 2, 4], 4)
    # The Q-Former reads a picture in the light of the question.
    count = 4 if family.processor.reencode_per_question else 2
    assert len(shared.is_real_tile) == count * family.config.tiles
    check(family, [[0, 1, 2, 4]], rows=4)
    # As the paper counts: all tokens of all tiles of each question's picture.
    tiles = sum(family.config.layout(SIZES[i]).tiles for i in (0, 1, 0, 0))
    found = _sum([family.alone(i)["vision"] for i in (0, 1, 2, 4)])
    assert found.kinds == ("cls", "image")
    assert found.tokens[0].tolist() == [tiles, family.config.vision.grid**2 * tiles]


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 4))]
)
def test_in_random_batchings(seed, family):
    check(family, list(batchings(seed, 2 + seed % 4)), rows=2 + seed % 4)


def test_keep_is_by_tile(tiny_model, tiny_config):
    processor = tiny.processor(tiny_config)
    asked = {"x": mj.keep(S.projector.out), "first": mj.keep(S.projector.out, where=tok.tile(0))}
    found = mj.run(tiny_model, read(processor, [0, 2, 4, 2], 4), None, asked, logits="none")
    assert found["x"].shape == found["first"].shape == (1, 4, 32)
    np.testing.assert_array_equal(found["x"], found["first"])


def test_by_reduce_as_by_hand(tiny_model, tiny_config):
    """34 tokens of a picture of 17 that two questions ask about, in one batch or two."""
    processor = tiny.processor(tiny_config)
    asked = {"fire": mj.stats(S.vision.mlp.act)}
    together, apart = (
        mj.reduce(asked, tiny_model, [read(processor, numbers, 2) for numbers in batches])
        for batches in ([[0, 2]], [[0], [2]])
    )
    assert together["fire"].tokens.tolist() == apart["fire"].tokens.tolist() == [34] * 2
    np.testing.assert_array_equal(together["fire"].positive, apart["fire"].positive)
    assert together["fire"].positive.any()


def test_joined_are_real_rows_and_tiles(tiny_config):
    """Four questions share two pictures, then one has its own: 3 tiles, and 5 rows."""
    processor = tiny.processor(tiny_config)
    batches = [read(processor, [0, 1, 2, 4], 4), read(processor, [5], 4)]
    asked = {"tile": mj.keep(S.vision.resid_post), "row": mj.mean(S.vision.resid_post[1])}
    parts = [
        {
            "tile": np.arange(len(b.is_real_tile))[None, :, None, None] + 10.0 * i,
            "row": np.arange(4)[:, None] + 10.0 * i,
        }
        for i, b in enumerate(batches)
    ]
    found = forms.join(asked, parts, batches)
    assert found["tile"].ravel().tolist() == [0, 1, 10]
    assert found["row"].ravel().tolist() == [0, 1, 2, 3, 10]


def test_readers_are_those_of_a_picture_whose_tiles_show_bars_alone():
    """A square fitted into a column of three squares: the LM reads the one in the middle."""
    config = llava_next.LlavaNextConfig.tiny()
    config = type(config).of(config.vision, config.lm, image_token=95, pinpoints=((72, 24),))
    batch = tiny.processor(config)([tiny.picture(0)] * 2 + [tiny.picture(1)], ["it ?"] * 3, rows=4)
    readers = config.readers(batch)
    assert len(np.unique(batch.image_token_index[0] // config.image_tokens)) < 4 + 1 + 1
    want = np.zeros((4, 2, 4), bool)  # rows, pictures, tiles
    want[[0, 1, 2], [0, 0, 1]] = True
    np.testing.assert_array_equal(readers, want.reshape(4, -1))
