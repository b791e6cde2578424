"""LLaVA-NeXT's arithmetic on picture sizes is HF's; the real ones have the sizes they should."""

from __future__ import annotations

import math
import types

import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.data import batching, features
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.interventions.shapes import site_shapes
from tests.helpers import hf, tiny

theirs = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")

REAL = llava_next.LlavaNextConfig.vicuna_7b()
TINY = llava_next.LlavaNextConfig.tiny()


def side() -> st.SearchStrategy[int]:
    """Of a picture: small, large, and such that thin ones come up."""
    return st.one_of(st.integers(1, 40), st.integers(1, 1500), st.integers(1500, 20000))


def packed(config: llava.LlavaConfig, size: tuple[int, int]) -> tuple[int, np.ndarray]:
    """Their tiles, and their order of patches (numbers in place of features, -1 for newline)."""
    pinpoints = [list(p) for p in config.pinpoints]
    vision = types.SimpleNamespace(
        image_size=config.vision.image_size, patch_size=config.vision.patch
    )
    network = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    )
    tiles = theirs.image_size_to_num_patches(size, pinpoints, config.vision.image_size)
    P = config.vision.grid**2
    numbers = hf.torch.arange(tiles * P, dtype=hf.torch.float32).reshape(tiles, P, 1)
    (features,), _ = theirs.LlavaNextModel.pack_image_features(
        network, [numbers], [size], "default", hf.torch.full((1,), -1.0)
    )
    return tiles, features[:, 0].numpy().astype(int)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(st.tuples(side(), side()))
@hypothesis.example((336, 336))
@hypothesis.example((1, 20000))
@hypothesis.example((20000, 1))
@hypothesis.example((88, 99))  # 26.999999999999996 columns, which are 27
@hypothesis.example((205, 984))
def test_layout_is_that_of_hf(size):
    tiles, patches = packed(REAL, size)
    layout = REAL.layout(size)
    assert layout.tiles == tiles
    np.testing.assert_array_equal(layout.patches, patches)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    st.tuples(side(), side()),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6),
)
def test_other_pinpoints(size, grids):
    pinpoints = tuple((24 * rows, 24 * columns) for rows, columns in grids)
    config = llava_next.LlavaNextConfig.of(TINY.vision, TINY.lm, pinpoints=pinpoints)
    tiles, patches = packed(config, size)
    layout = config.layout(size)
    assert layout.tiles == tiles <= config.tiles
    assert len(layout.patches) <= len(config.layout(config.largest).patches)
    np.testing.assert_array_equal(layout.patches, patches)


@pytest.mark.parametrize(
    ("size", "tiles", "tokens"),
    [
        ((672, 672), 5, 2928),  # 576 of the base, 48 rows of 48 and a newline
        ((336, 336), 3, 576 + 24 * 25),  # of a resolution twice as wide, the half in the middle
        ((300, 500), 3, 1560),
        ((480, 640), 5, 576 + 36 * 49),
        ((1, 20000), 3, 576),  # so thin that nothing of it is left
    ],
)
def test_tokens_of_a_picture(size, tiles, tokens):
    layout = REAL.layout(size)
    assert (layout.tiles, len(layout.patches)) == (tiles, tokens)


def test_a_picture_row_by_row():
    """Of 24 x 48, in two tiles of 4 x 4 patches after the base."""
    layout = TINY.layout((12, 24))
    base, left, right = np.arange(48).reshape(3, 4, 4)
    lines = [[*a, *b, -1] for a, b in zip(left, right, strict=True)]
    np.testing.assert_array_equal(layout.patches, [*base.ravel(), *np.ravel(lines)])
    # Half as high: a quarter of the rows falls away above, and below.
    np.testing.assert_array_equal(
        TINY.layout((6, 24)).patches, [*base.ravel(), *np.ravel(lines[1:3])]
    )


def test_the_newline_is_after_the_last_tile(model):
    batch = types.SimpleNamespace(features=np.ones((5, 16, TINY.vision.width), np.float32))
    images = model.images(batch, hf.run.Taps()).tokens
    assert images.shape == (5 * 16 + 1, TINY.lm.width)
    np.testing.assert_array_equal(images[-1], model.newline[...])


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(TINY)


@pytest.fixture(scope="module")
def processor():
    return tiny.processor(TINY)


PICTURES = [[tiny.picture(0, 12, 24)], [tiny.picture(1, 48, 40), tiny.picture(2, 70, 24)]]
PROMPTS = ["<image> what is it ?", "<image> a <image> cat or dog ?"]


def test_a_row_alone_is_the_row_in_its_batch(model, processor):
    """Neither tiles that fill a picture's places nor empty rows count anywhere."""
    asked = {
        "vision": mj.stats(S.vision.mlp.act, by=tok.kind),
        "projector": mj.stats(S.projector.act, by=tok.kind),
        "lm": mj.stats(S.lm.mlp.act, by=tok.kind),
    }
    edits = mj.scale(S.lm.mlp.act, 0.0, where=tok.newline) >> mj.add(S.projector.out, 1.0)
    whole = mj.run(model, processor(PICTURES, PROMPTS, rows=3, length=256), edits, asked)
    parts = [
        mj.run(model, processor([p], [text], length=256), edits, asked)
        for p, text in zip(PICTURES, PROMPTS, strict=True)
    ]
    logits = np.concatenate([part.logits for part in parts])
    np.testing.assert_allclose(whole.logits[:2], logits, rtol=0, atol=1e-5)
    layouts = [[TINY.layout(p.size[::-1]) for p in row] for row in PICTURES]
    tiles = [sum(x.tiles for x in row) for row in layouts]
    newlines = [sum((x.patches < 0).sum() for x in row) for row in layouts]
    assert tiles == [3, 9] and newlines == [4, 20]
    for out, rows in ((whole, (0, 1)), (parts[0], (0,)), (parts[1], (1,))):
        found, lines = (sum(numbers[i] for i in rows) for numbers in (tiles, newlines))
        assert [set(r.tokens.tolist()) for r in out.receipts] == [{lines}, {found * 16}]
    for name in asked:
        for field in ("tokens", "sum", "squares"):
            a, b, c = (np.asarray(getattr(out[name], field)) for out in (whole, *parts))
            np.testing.assert_allclose(a, b + c, rtol=0, atol=1e-3)


def test_the_newline_and_a_tile_can_be_meant(model, processor):
    """An edit there changes what is said; the other tiles' patches stay as they were."""
    batch = processor(PICTURES, PROMPTS, rows=3, length=256)
    clean = mj.run(model, batch).logits
    for where in (tok.newline, tok.tile(2) & tok.row(0), tok.tile(TINY.tiles)):
        out = mj.run(model, batch, mj.scale(S.lm.embed, 2.0, where=where))
        assert np.abs(out.logits - clean).max() > 1e-3
    assert out.receipts[0].tokens.tolist() == [16]  # the base of the second picture of a row
    kept = mj.run(model, batch, mj.ablate(S.vision.mlp.act[1], where=tok.tile(2)),
                  {"out": mj.keep(S.projector.out)})["out"]  # fmt: skip
    before = mj.run(model, batch, None, {"out": mj.keep(S.projector.out)})["out"]
    changed = np.flatnonzero(np.abs(kept - before).max((-1, -2)) > 1e-6)
    np.testing.assert_array_equal(changed, np.flatnonzero(batch.is_real_tile & (batch.tile == 2)))


def test_pictures_of_all_shapes_share_one_program(model, processor):
    def logits(*shapes):
        a, b, c = (tiny.picture(i, *shape) for i, shape in enumerate(shapes))
        batch = processor([[a], [b, c]], PROMPTS, rows=3, length=256)
        return np.asarray(mj.run(model, batch).logits)

    first = logits((48, 48), (24, 24), (9, 70))
    before = mj.compiles()
    assert np.abs(logits((12, 24), (70, 9), (30, 31)) - first).max() > 1e-3
    assert mj.compiles() == before


def test_features_stand_in_for_pixels(model, processor, tmp_path):
    pictures = [tiny.picture(0, 12, 24), tiny.picture(1, 48, 40), tiny.picture(2, 70, 24)]
    examples = [types.SimpleNamespace(image=picture) for picture in pictures]
    kept = features.vision_features(model, processor, examples, tmp_path / "f.npy", batch_size=2)
    assert kept.shape == (3, 5 * 16, TINY.vision.width)
    prompts, sizes = ["what ?"] * 3, [picture.size[::-1] for picture in pictures]
    given = processor(None, prompts, features=kept, sizes=sizes)
    ours = [mj.run(model, b).logits for b in (processor(pictures, prompts), given)]
    np.testing.assert_allclose(*ours, rtol=0, atol=1e-5)


def test_length_for_any_picture(processor):
    """Rows of a data set have one length, whatever their pictures."""
    question = types.SimpleNamespace(prompt="what is it ?", answer="a cat")
    length = batching.row_length(processor, [(None, question)])
    tokens = [
        processor([tiny.picture(0, *size)], [question.prompt]).valid.sum()
        for size in ((48, 48), (72, 24), (24, 24), (9, 70))
    ]
    assert max(tokens) <= length < max(tokens) + 8
    packed = batching.packed_length(processor, [[question]], 1)
    assert max(tokens) + 3 <= packed < max(tokens) + 3 + 8


REAL_ONES = {
    "1.5-7b": (llava.LlavaConfig.llava_1_5_7b(), 11008, 32),
    "1.5-13b": (llava.LlavaConfig.llava_1_5_13b(), 13824, 40),
    "next-vicuna-7b": (REAL, 11008, 32),
    "next-vicuna-13b": (llava_next.LlavaNextConfig.vicuna_13b(), 13824, 40),
    "next-mistral-7b": (llava_next.LlavaNextConfig.mistral_7b(), 14336, 32),
}


@pytest.mark.parametrize("name", REAL_ONES)
def test_modules_of_the_real_ones(name, make_batch):
    """L x I of MMNeuron's table (Huo et al. 2024), found without a weight, and K, one in 100.

    CLIP's table has 24 layers; of the 24th LLaVA reads nothing, so here it does not exist.
    """
    config, mlp, layers = REAL_ONES[name]
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    shapes = site_shapes(model, make_batch(config, images=(1,), words=(8,)))
    found = {
        module: (shapes[f"{module}.mlp.act"].layers, shapes[f"{module}.mlp.act"].shape[-1])
        for module in ("lm", "vision")
    }
    hidden = shapes["projector.act"]
    assert found == {"lm": (layers, mlp), "vision": (23, 4096)}
    assert (hidden.layers, hidden.shape[-1]) == (1, config.lm.width)
    assert config.vision.layers * config.vision.mlp == 98_304
    if name.endswith("vicuna-7b"):
        sizes = (layers * mlp, config.vision.layers * config.vision.mlp, hidden.shape[-1])
        assert sizes == (352_256, 98_304, 4096)
        assert [round(0.01 * size) for size in sizes] == [3523, 983, 41]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("next-vicuna-7b", 7_063_431_168),
        ("next-vicuna-13b", 13_351_499_776),
        ("next-mistral-7b", 7_566_747_648),
    ],
)
def test_parameters_of_the_real_ones(name, known):
    config = REAL_ONES[name][0]
    text = None
    if "mistral" in name:
        text = hf.llama_config(config.lm, hf.transformers.MistralConfig, sliding_window=None)
    with hf.torch.device("meta"):
        network = hf.transformers.LlavaNextForConditionalGeneration(hf.llava_config(config, text))
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    assert sum(sizes.values()) == known
    above = [n for n in sizes if "post_layernorm" in n or "encoder.layers.23." in n]
    ours = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours))
    assert count == known - sum(sizes[name] for name in above)
