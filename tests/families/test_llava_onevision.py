"""LLaVA-OneVision: how pictures of any size are read at the sizes of the released models."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families
from mllm_jax.families.llava_onevision import model as onevision
from tests.helpers import hf, tiny
from tests.helpers.families import OneVisionProcessor

REAL = onevision.LlavaOneVisionConfig.qwen2_7b()
SIZES = [
    (384, 384), (1, 1), (480, 640), (640, 480), (1080, 1920), (1920, 1080), (2304, 2304),
    (3000, 4000), (4000, 3000), (100, 2000), (2000, 100), (1382, 1152), (1383, 1152), (385, 385),
    (700, 701), (1536, 1153), (5000, 5001), (37, 91), (2304, 384), (384, 2304), (999, 333),
    (1024, 768), (1200, 1600), (1601, 1200), (50, 49), (2303, 2305), (767, 769), (1152, 1536),
    (1151, 2000), (2500, 1100),
]  # fmt: skip


@functools.cache
def theirs() -> OneVisionProcessor:
    """Their processor without anything but the settings that the number of tokens depends on."""
    processor = object.__new__(OneVisionProcessor)
    processor.image_processor = hf.transformers.LlavaOnevisionImageProcessorPil()
    processor.num_image_tokens, processor.vision_aspect_ratio = 729, "anyres_max_9"
    return processor


def test_pinpoints_are_those_of_transformers():
    given = hf.transformers.LlavaOnevisionImageProcessorPil().image_grid_pinpoints
    assert tuple(map(tuple, given)) == REAL.pinpoints


def test_the_number_of_tokens_of_30_odd_sizes():
    for size in SIZES:
        want = theirs()._get_number_of_features(*size, 384, 384)
        assert len(REAL.layout(size).patches) == want, size


@pytest.mark.slow
def test_the_number_of_tokens_of_many_sizes():
    rng = np.random.default_rng(0)
    for size in rng.integers(1, 4000, (2000, 2)).tolist():
        want = theirs()._get_number_of_features(*size, 384, 384)
        assert len(REAL.layout(tuple(size)).patches) == want, size
        assert want <= len(REAL.layout(REAL.largest).patches)


def test_tokens_are_what_transformers_packs():
    """At the real size: the base, then the picture without its bars, shrunk, with newlines."""
    config = hf.transformers.LlavaOnevisionConfig()
    module = hf.transformers.models.llava_onevision.modeling_llava_onevision
    packing = object.__new__(module.LlavaOnevisionModel)
    hf.torch.nn.Module.__init__(packing)
    packing.config = config
    rng = np.random.default_rng(0)
    newline = rng.normal(size=2).astype(np.float32)
    for size in SIZES[::2]:
        layout = REAL.layout(size)
        features = rng.normal(size=(layout.tiles, 729, 2)).astype(np.float32)
        [want], _ = packing.pack_image_features(
            [hf.torch.from_numpy(features)], [size], hf.torch.from_numpy(newline)
        )
        flat = np.concatenate([features.reshape(-1, 2), newline[None]])
        if layout.interpolation is None:
            got = flat[layout.patches]
        else:
            index, weight = layout.interpolation
            got = np.where(
                layout.patches[:, None] < 0, newline, (flat[index] * weight[..., None]).sum(1)
            )
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-6)
    assert sum(REAL.layout(size).interpolation is not None for size in SIZES[::2]) >= 4


def test_several_pictures_of_a_row_are_one_tile_each():
    one, other = REAL.layouts([(2304, 2304), (10, 20)])
    assert one.tiles == other.tiles == 1
    assert (one.patches == np.append(np.arange(729), -1)).all()
    assert REAL.layouts([(2304, 2304)])[0].tiles == 37


def test_config_of_the_hub():
    """`llava-hf/llava-onevision-qwen2-7b-ov-hf`, shortened by its defaults."""
    fields = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": [list(size) for size in REAL.pinpoints],
        "image_token_index": 151646,
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "Qwen/Qwen2-7B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 152128,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.45.0.dev0",
        "use_image_newline_parameter": True,
        "video_token_index": 151647,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    assert families.from_hf(fields) == REAL
    bare = {name: fields[name] for name in ("model_type", "text_config")}
    assert families.from_hf(bare) == REAL
    as_5 = {
        n.replace("token_index", "token_id"): value for n, value in fields.items()
    }  # fmt: skip
    assert families.from_hf(as_5) == REAL


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio='anyres' is not supported"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "only siglip_vision_model"),
        ({"image_grid_pinpoints": [[384, 385]]}, "image_grid_pinpoints"),
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantised by 'awq'"),
        ({"text_config": {"model_type": "qwen2_moe"}}, "qwen2_moe"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        families.from_hf({"model_type": "llava_onevision"} | fields)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.fixture(scope="module")
def processor():
    return tiny.processor(onevision.LlavaOneVisionConfig.tiny())


def test_videos_are_refused(processor):
    with pytest.raises(ValueError, match=r"a video \(<video>\): give its frames as pictures"):
        processor(None, ["<video> what is it ?"])


def test_a_row_has_places_for_its_tiles_alone(processor):
    """Few numbers of places; two pictures in a row have two tiles, however large they are."""
    large, small = tiny.picture(0, 72, 72), tiny.picture(1, 24, 20)
    assert len(processor([[large]], ["what ?"]).tile) == 10
    assert len(processor([[small]], ["what ?"]).tile) == 2
    both = processor([[large, large], [small]], ["what ?"] * 2)
    assert both.tile.tolist() == [0, 1, 0, 1] and both.is_real_tile.all()
    image = both.tokens.kind == mj.tokens.CODE["image"]
    assert np.unique(both.tokens.tile[0][image[0]]).tolist() == [0, 1]


def test_rows_and_columns_of_a_shrunk_picture(processor):
    """Each token is named by the patch that is nearest to its middle, of the parts in order."""
    batch = processor([[tiny.picture(0, 72, 72)]], ["what ?"])
    assert batch.interpolation is not None
    image = batch.tokens.kind[0] == mj.tokens.CODE["image"]
    tile, row, column = (
        getattr(batch.tokens, name)[0][image] for name in ("tile", "row", "column")
    )
    parts = tile > 0
    across = (tile[parts] - 1) % 3 * 4 + column[parts]
    down = (tile[parts] - 1) // 3 * 4 + row[parts]
    side = int(np.sqrt(parts.sum()))
    assert side == 6  # 12 patches, made smaller by sqrt(9 / 3)
    middles = (np.arange(side) + 0.5) * 12 / side - 0.5
    for got in (across.reshape(side, side)[0], down.reshape(side, side)[:, 0]):
        assert np.abs(got - middles).max() <= 0.5
        assert len(np.unique(got)) == side
    weight = batch.interpolation.weight[0][image]
    np.testing.assert_allclose(weight.sum(-1), 1, rtol=1e-6)


def test_a_packed_row_is_its_questions_apart(processor):
    turns = [[("what is it ?", "a cat"), ("is it a dog ?", "no")]]
    packed = processor.pack([tiny.picture(0, 72, 72)], turns)
    rows = processor.unpack(packed)
    alone = processor(
        [tiny.picture(0, 72, 72)] * 2, [q for q, _ in turns[0]], answers=[a for _, a in turns[0]]
    )
    for name in ("index", "weight"):
        got, want = (getattr(b.interpolation, name) for b in (rows, alone))
        for row in range(2):
            ours, theirs = got[row][rows.valid[row]], want[row][alone.valid[row]]
            np.testing.assert_array_equal(ours < 0, theirs < 0)
            assert len(np.unique((theirs - ours)[theirs >= 0])) == 1
