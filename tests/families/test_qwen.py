"""The Qwens: pictures of any size in few programs, positions of three axes, DeepStack, data."""

from __future__ import annotations

import dataclasses
import functools
import types

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.data import batching, features, pooled
from mllm_jax.data.embedded.questions import Question
from mllm_jax.families.qwen2_5_vl.processor import QwenVLProcessor, resized
from mllm_jax.planning import compilation, plan, programs
from mllm_jax.training import fit, parts
from tests.helpers import hf, qwen, tiers, tiny

VERSIONS = ("2", "2.5", "3")
# (height, width): odd, small, long and large.
SIZES = [
    (1, 1), (1, 2), (3, 5), (7, 7), (8, 8), (9, 200), (11, 13), (16, 16), (17, 31), (20, 4),
    (23, 46), (28, 28), (29, 57), (31, 1), (33, 77), (40, 60), (41, 43), (48, 16), (53, 59), (60, 1),
    (64, 64), (67, 10), (71, 142), (80, 81), (90, 30), (97, 101), (100, 1), (113, 7), (128, 64),
    (200, 9),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(model, processor, what transformers made) of a version, made once."""

    @functools.cache
    def make(version):
        family = qwen.checkpoint(version, tmp_path_factory.mktemp(f"qwen{version}"))
        return *mj.load(family.directory, dtype="float32"), family

    return make


@pytest.fixture(scope="module", params=VERSIONS)
def processors(request):
    """Ours and theirs."""
    config = families.FAMILIES[qwen.FOLDER[request.param]].config.tiny()
    return qwen.processor(config), qwen.processor_of(config)


def test_thirty_sizes_are_theirs(processors):
    ours, theirs = processors
    for number, size in enumerate(SIZES):
        pictures = [tiny.picture(number, *size), tiny.picture(99, 30, 50)]
        text = f"{qwen.WRITTEN} what {qwen.WRITTEN}"
        want = theirs(pictures, text)
        batch = ours([pictures], ["<image> what <image>"])
        np.testing.assert_array_equal(batch.ids[batch.valid], want["input_ids"][0])
        given = qwen.inputs(batch, [pictures])
        np.testing.assert_array_equal(given["image_grid_thw"], want["image_grid_thw"])
        np.testing.assert_array_equal(given["pixel_values"], want["pixel_values"])
        for tile in (0, 1):  # the picture is that which is seen, each token at its place
            rows, columns = batch.grid[tile] // 2
            own = batch.tokens.tile[0] == tile
            places = np.stack(np.divmod(np.arange(rows * columns), columns))
            np.testing.assert_array_equal(batch.tokens.row[0][own], places[0])
            np.testing.assert_array_equal(batch.tokens.column[0][own], places[1])


def test_sizes_are_rounded_as_theirs():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng(0)
    for size in np.exp(rng.uniform(0, np.log(5000), (3000, 2))).astype(int).tolist():
        for limits in ((28, 56 * 56, 28 * 28 * 1280), (32, 65536, 16777216), (28, 3136, 12845056)):
            if max(size) <= 200 * min(size):
                assert resized(tuple(size), *limits) == module.smart_resize(*size, *limits)
    with pytest.raises(ValueError, match="201 x 1 .*more than 200 times as long"):
        resized((1, 201), 28, 3136, 10**6)


def test_a_tile_is_the_picture_that_is_seen(processors):
    ours, _ = processors
    picture = tiny.picture(5, 32, 56)
    batch = ours([picture], ["<image> what"])
    seen = ours.tile_picture(batch, 0)
    assert seen.size == (56, 32)
    assert np.abs(np.asarray(seen, int) - np.asarray(picture, int)).max() <= 1
    assert "<img" in batch._repr_html_()


def test_hundred_sizes_need_few_shapes():
    """With the limits and the patches of the released models."""
    config = families.RELEASED["qwen2.5-vl-7b"]()
    images = hf.transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 3136, "longest_edge": 12845056}
    )
    tokenizer = qwen.processor_of(families.FAMILIES["qwen2_5_vl"].config.tiny()).tokenizer
    config = dataclasses.replace(config, image_token=95)
    processor = QwenVLProcessor(tokenizer, lambda: images, config)
    rng = np.random.default_rng(0)
    shapes = set()
    for size in np.exp(rng.uniform(np.log(100), np.log(3500), (100, 2))).astype(int).tolist():
        places = processor.feature_places([tuple(size)])
        batch = processor(
            None, ["what is it ?"], features=np.zeros((1, places, 1), np.float32), sizes=[size]
        )
        shapes.add((batch.features.shape[1], batch.ids.shape[1]))
        assert batch.valid.sum() <= places // 4 + 32
    assert 4 <= len(shapes) <= 8, shapes
    small = {
        (b.pixels.shape, b.ids.shape)
        for b in (processor([tiny.picture(0, *s)], ["what"]) for s in [(300, 200), (350, 250)])
    }
    assert len(small) == 1  # pixels as features


def test_pictures_of_one_length_share_a_program(checkpoints):
    model, processor, _ = checkpoints("2.5")
    sizes = [(8, 16), (40, 40), (16, 90), (45, 31)]
    mj.compiles()  # counts from here on
    first = mj.run(model, processor([tiny.picture(0, 30, 30)], ["what is it ?"]))
    before = mj.compiles()
    for size in sizes:
        out = mj.run(model, processor([tiny.picture(1, *size)], ["is it a cat ?"]))
        assert np.abs(np.asarray(out.logits) - np.asarray(first.logits)).max() > 1e-3
    assert mj.compiles() == before


@pytest.mark.parametrize("left", [False, True])
def test_positions_are_theirs(left, checkpoints):
    """With several pictures in a row, none, and one after another."""
    for version in ("2.5", "3"):
        _, processor, family = checkpoints(version)
        pictures = [
            [tiny.picture(0, 40, 60), tiny.picture(1, 9, 90)],
            [],
            [tiny.picture(2, 60, 20), tiny.picture(3, 8, 8), tiny.picture(4, 30, 30)],
        ]
        prompts = ["<image> a <image> what", "yes no", "is <image><image> and <image>"]
        batch = processor(pictures, prompts, left=left)
        given = {k: hf.torch.from_numpy(v) for k, v in qwen.inputs(batch, pictures).items()}
        del given["pixel_values"]
        want, deltas = family.network.model.get_rope_index(**given)
        np.testing.assert_array_equal(
            batch.rotary_position[:, batch.valid], want.numpy()[:, batch.valid]
        )
        after = batch.positions.after(batch.last, np.arange(1, 3), np.ones((3, 2), bool))
        length = batch.valid.sum(1)[:, None] + np.arange(2)
        np.testing.assert_array_equal(after.rotary[0], length + deltas.numpy())
        np.testing.assert_array_equal(after.rotary[0], after.rotary[2])


@pytest.mark.parametrize("version", VERSIONS)
def test_text_alone(version, checkpoints):
    model, processor, family = checkpoints(version)
    batch = processor(None, ["what is it ?", "yes"])
    assert batch.ids.shape[1] == 32 and not len(batch.is_real_tile)
    with hf.torch.no_grad():
        want = family.network(
            input_ids=hf.torch.from_numpy(batch.ids.astype(int)),
            attention_mask=hf.torch.from_numpy(batch.valid.astype(int)),
        ).logits.numpy()
    got = np.asarray(mj.run(model, batch, logits="all").logits)
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-4)


def _first_logits(out):
    return out.logits[:, :8]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3", "2.5"])
def test_a_sweep_that_shares_is_one_that_does_not(version, checkpoints):
    """Lanes resume among and after the layers of DeepStack, and after a shared prefix."""
    model, processor, _ = checkpoints(version)
    batch = processor([tiny.picture(0, 40, 60), tiny.picture(1, 30, 30)], ["what is it ?"] * 2)
    lanes = [mj.ablate(S.lm.mlp.act[layer, [1, 5]], where=tok.last) for layer in range(4)]
    lanes += [mj.scale(S.lm.resid_post[layer], 0.5, where=tok.image) for layer in range(4)]
    stacks = [mj.stack(lanes[:4]), mj.stack(lanes[4:])]
    for stacked in stacks:
        shared = mj.sweep(_first_logits, model, batch, stacked)
        alone = mj.sweep(_first_logits, model, batch, stacked, share=False)
        np.testing.assert_allclose(shared, alone, rtol=0, atol=1e-5)
        assert np.abs(shared[0] - shared[1]).max() > 1e-3
    clean = np.asarray(mj.run(model, batch).logits[:, :8])
    assert np.abs(shared - clean).max() > 1e-2


def test_deepstack_stands_between_layers_and_can_be_edited(checkpoints):
    model, processor, _ = checkpoints("3")
    batch = processor([tiny.picture(0, 40, 60)], ["what is it ?"])
    captures = {
        "added": mj.keep(S.projector.deepstack),
        "post": mj.keep(S.lm.resid_post[1]),
        "pre": mj.keep(S.lm.resid_pre[2]),
    }
    image = np.flatnonzero(batch.tokens.kind[0] == tok.CODE["image"])
    for edit, factor in ((None, 1), (mj.scale(S.projector.deepstack[1], 3.0), 3)):
        out = mj.run(model, batch, edit, captures)
        step = np.asarray(out["pre"][0] - out["post"][0])
        clean = np.asarray(mj.run(model, batch, None, captures)["added"])
        assert clean.shape[0] == len(model.config.vision.deepstack) == 2
        np.testing.assert_allclose(step[image], factor * clean[1, 0, : len(image)], atol=1e-5)
        assert not np.delete(step, image, 0).any() and np.abs(step).max() > 0.1


def test_video_is_refused(processors):
    ours, _ = processors
    with pytest.raises(ValueError, match="has a video .*give its frames as pictures"):
        ours(None, ["<|vision_start|><|video_pad|><|vision_end|> what"])
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what"}]}]
    with pytest.raises(ValueError, match="video"):
        ours(None, [chat])


def test_the_settings_of_pictures(processors, tmp_path):
    ours, theirs = processors
    config, tokenizer = ours.config, ours.tokenizer

    def make(**settings):
        made = {"patch_size": 4, "size": {"shortest_edge": 128, "longest_edge": 2048}} | settings
        return lambda: hf.transformers.Qwen2VLImageProcessorPil(**made)

    less = QwenVLProcessor(tokenizer, make(), config, max_pixels=512)
    assert less.patch_grid((64, 64)) == (4, 4) and ours.patch_grid((64, 64)) == (10, 10)
    same = QwenVLProcessor(tokenizer, make(min_pixels=64, max_pixels=512, size=None), config)
    assert same.patch_grid((64, 64)) == (4, 4)
    assert less._fingerprint_() != ours._fingerprint_()
    for settings, message in (
        ({"patch_size": 14}, "'patch_size': 14"),
        ({"merge_size": 1}, "'merge_size': 1"),
        ({"do_resize": False}, "'do_resize': False"),
        (
            {"size": {"shortest_edge": 9, "longest_edge": 8}},
            "the smallest and largest number of pixels",
        ),
    ):
        wrong = QwenVLProcessor(tokenizer, make(**settings), config)
        with pytest.raises(ValueError, match=message):
            wrong([tiny.picture(0)], ["what"])
    with pytest.raises(ValueError, match="image_aspect_ratio='pad': this model has keep"):
        QwenVLProcessor(tokenizer, make(), config, image_aspect_ratio="pad")
    with pytest.raises(ValueError, match="less than the pixels of one image token"):
        QwenVLProcessor(tokenizer, make(), config, max_pixels=63)


EXAMPLES = [
    types.SimpleNamespace(
        image=tiny.picture(number, *size), encoded=bytes([number]), domain="a", id=str(number),
        questions=(Question("open", "what is it ?", "a cat", ("a cat",)),),
    )
    for number, size in enumerate([(40, 60), (90, 30), (8, 8), (30, 30), (64, 64)])
]  # fmt: skip


@pytest.mark.parametrize("version", ["3", pytest.param("2.5", marks=pytest.mark.slow)])
def test_features_of_pictures_of_several_sizes(version, checkpoints, tmp_path):
    """Stored once and padded to one number of places, they stand for the pictures."""
    model, processor, _ = checkpoints(version)
    stored = features.vision_features(
        model, processor, EXAMPLES, tmp_path / "features.npy", batch_size=2
    )
    assert stored.shape == (5, 512, model.config.vision.feature_width)
    pairs = [(e, e.questions[0]) for e in EXAMPLES]
    length = batching.row_length(processor, pairs)
    with_pictures = batching.QuestionBatches(processor, pairs, 5, length)[0]
    read = batching.QuestionBatches(processor, pairs, 5, length, stored)[0]
    assert length == -(-int(read.valid.sum(1).max()) // 8) * 8
    got, want = (mj.run(model, b).logits for b in (read, with_pictures))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    prompts = ["what is it ?"] * 5
    means = pooled.pooled_features(
        model, processor, EXAMPLES, prompts, tmp_path / "pooled", features=stored, batch_size=5
    )
    width = model.config.vision.width
    for number, (example, row) in enumerate(zip(EXAMPLES, stored, strict=True)):
        rows, columns = processor.patch_grid(example.image.size[::-1])
        np.testing.assert_allclose(
            means["vision"][number], row[: rows * columns, :width].mean(0), rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_what_is_trained(checkpoints):
    """The projector with that of DeepStack; the LM; adapters."""
    model, processor, _ = checkpoints("3")
    batch = processor([e.image for e in EXAMPLES], ["what is it ?"] * 5, answers=["a cat"] * 5)
    for part in ("projector", "lm", "lora"):
        _, trained, _ = parts.partition(model, part)
        recipe = fit.Recipe(part=part, rate=1e-2)
        tuned, losses = fit.fit(model, [batch] * 4, recipe)
        assert losses[-1] < losses[0], (part, losses)
        assert trained
        changed = tuned.projector.deepstack.linears[0].kernel[...]
        same = np.array_equal(changed, model.projector.deepstack.linears[0].kernel[...])
        assert same == (part != "projector")


@pytest.mark.parametrize(
    "study", tiers.slow_except(["counts+lens"], [*programs.STUDIES, "counts+lens"])
)
def test_every_study_can_be_planned(study, monkeypatch):
    monkeypatch.setattr(compilation, "has_tpu_compiler", lambda: False)
    config = families.FAMILIES["qwen3_vl"].config.tiny()
    size = programs.Size(rows=4, words=20, answer=5)
    found = plan.plan(config, size, topology="v5e:2x4", study=study, data=2)
    assert found.tokens == 1152 and found.flops > 0  # 1,024 image tokens
    assert found.bytes["weights"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2", "3"])
def test_a_tied_head(version, tmp_path):
    family = qwen.checkpoint(version, tmp_path, tied=True)
    model, processor = mj.load(tmp_path, dtype="float32")
    assert model.config == family.config and model.config.lm.tied
    batch = processor([tiny.picture(0, 40, 60)], ["what is it ?"])
    given = {k: hf.torch.from_numpy(v) for k, v in qwen.inputs(batch, []).items()}
    with hf.torch.no_grad():
        want = family.network(**given).logits.numpy()
    got = np.asarray(mj.run(model, batch, logits="all").logits)
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-4)
