"""InternVL: its config in every form, its keys, and how a picture becomes tiles."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families
from mllm_jax.families.internvl.model import InternVlConfig
from tests.helpers import hf, internvl, tiny

# config.json of OpenGVLab/InternVL3-8B-hf: what equals the defaults of the time is not in it.
INTERNVL3_8B = {
    "architectures": ["InternVLForConditionalGeneration"],
    "downsample_ratio": 0.5,
    "image_seq_length": 256,
    "image_token_id": 151667,
    "model_type": "internvl",
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "attention_bias": True,
        "hidden_size": 1024,
        "image_size": [448, 448],
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-06,
        "model_type": "internvl_vision",
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": [14, 14],
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
_3_5_8B = {
    "text_config": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "vocab_size": 151936, "attention_bias": False, "rope_scaling": None,
    },
}  # fmt: skip
_6B = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25,
    "num_hidden_layers": 45, "attention_bias": False, "norm_type": "rms_norm", "use_qk_norm": True,
}  # fmt: skip
_32B = {
    "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
    "num_hidden_layers": 64, "num_key_value_heads": 8,
}  # fmt: skip


def changed(**parts):
    """The config with fields changed: of the whole, `text_config` or `vision_config`."""
    fields = dict(INTERNVL3_8B)
    for name, value in parts.items():
        fields[name] = fields[name] | value if isinstance(fields.get(name), dict) else value
    return fields


@pytest.mark.parametrize(
    ("fields", "name", "parameters"),
    [
        (INTERNVL3_8B, "internvl3-8b", 7_944_373_760),
        (changed(**_3_5_8B), "internvl3.5-8b", 8_528_318_464),
        (changed(vision_config=_6B, text_config=_32B), "internvl3-38b", 38_388_164_992),
    ],
)
def test_released_configs(fields, name, parameters):
    """The number of parameters is that which the hub shows."""
    config = families.from_hf(fields)
    assert config == families.RELEASED[name]()
    assert families.from_hf(families.of(config).to_hf(config)) == config
    assert hf.count(config) == parameters


def test_defaults_are_those_of_transformers():
    theirs = hf.transformers.InternVLConfig()
    assert families.from_hf(theirs.to_dict()) == families.from_hf({"model_type": "internvl"})


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),  # the root's decides
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_which_flag_ties_the_head(change, tied):
    assert families.from_hf(changed(**change)).lm.tied is tied
    silent = {k: v for k, v in INTERNVL3_8B["text_config"].items() if "tie" not in k}
    assert families.from_hf(INTERNVL3_8B | {"text_config": silent}).lm.tied


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "internvl_chat", "llm_config": {}}, "load the conversion to transformers"),
        (changed(text_config={"model_type": "qwen3_moe"}), "text_config.model_type='qwen3_moe'"),
        (changed(text_config={"model_type": "gpt_oss"}), "text_config.model_type='gpt_oss'"),
        (changed(vision_feature_layer=[-1, -2]), "vision_feature_layer=[-1, -2]"),
        (changed(vision_feature_layer=30), "the vision tower has 24 layers"),
        (changed(vision_feature_select_strategy="full"), "vision_feature_select_strategy='full'"),
        (changed(downsample_ratio=0.3), "downsample_ratio=0.3"),
        (changed(vision_config={"use_mask_token": True}), "use_mask_token=True"),
        (changed(vision_config={"image_size": [448, 224]}), "image_size=[448, 224] is not a squ"),
        (changed(min_dynamic_patch=13), "min_dynamic_patch=13 is above max_dynamic_patch=12"),
        (changed(audio_config={}), "unknown field audio_config"),
        (changed(quantization_config={"quant_method": "awq"}), "quantised by 'awq'"),
    ],
)
def test_refused_by_name(fields, words):
    with pytest.raises(ValueError) as error:
        families.from_hf(fields, "here/config.json")
    assert words in str(error.value) and "\n" not in str(error.value)


SIZES = [(n * 97 % 1501 + 1, n * 331 % 1709 + 1) for n in range(40)]
SIZES += [(448, 448), (896, 896), (634, 634), (633, 633), (1344, 1344), (1, 2000), (2000, 1)]


@pytest.mark.parametrize(("low", "high"), [(1, 12), (1, 1), (2, 6), (3, 40)])
def test_the_grid_of_tiles_is_theirs(low, high):
    module = hf.transformers.models.got_ocr2.image_processing_pil_got_ocr2
    config = InternVlConfig.of(
        families.RELEASED["internvl3-1b"]().vision, InternVlConfig.tiny().lm,
        min_tiles=low, max_tiles=high,
    )  # fmt: skip
    for size in SIZES:
        columns, rows = module.get_optimal_tiled_canvas(size, (448, 448), low, high)
        assert config.tile_grid(size) == (rows, columns), size
        assert config.layout(size).tiles == rows * columns + (rows * columns > 1) <= config.tiles
    assert config.layout(config.largest).tiles == config.tiles


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return internvl.checkpoint(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def processor(checkpoint):
    return mj.load(checkpoint.directory, dtype=jnp.float32)[1]


def test_pixels_of_odd_sizes_are_theirs(checkpoint, processor):
    """Tiles row by row, the whole picture last."""
    for number, (height, width) in enumerate(SIZES[:30]):
        picture = tiny.picture(number, height // 9 + 1, width // 9 + 1)
        want = checkpoint.processor([picture], internvl.WRITTEN)
        batch = processor([picture], ["<image>"])
        np.testing.assert_array_equal(batch.ids[batch.valid], want["input_ids"][0])
        pixels = want["pixel_values"].transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(batch.pixels[batch.is_real_tile], pixels)


def test_a_row_has_places_for_the_tiles_that_it_needs(processor):
    """Two pictures of one row stand side by side; the tokens know their tile."""
    flat, wide = tiny.picture(0, 24, 24), tiny.picture(1, 20, 90)
    counts = [processor.layout(p.size[::-1]).tiles for p in (flat, wide)]
    assert counts == [1, 5]
    batch = processor([[flat, wide], []], ["<image> what <image>", "yes no"])
    assert batch.is_real_tile.tolist() == [True] * 6 + [False] * 8
    tokens = batch.tokens.tile[0][batch.tokens.kind[0] == mj.tokens.CODE["image"]]
    np.testing.assert_array_equal(tokens, np.repeat(np.arange(6), 4))
    assert len(processor([flat], ["<image>"]).is_real_tile) == 1


def test_video_is_refused(processor):
    with pytest.raises(ValueError, match=r"has a video \(<video>\): give its frames as pictures"):
        processor(None, ["<video> <image> what"])
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what"}]}]
    with pytest.raises(ValueError, match="video"):
        processor(None, [chat])


def test_features_need_sizes(processor):
    features = np.zeros((1, 5 * 16, 32), np.float32)
    batch = processor(None, ["<image>"], features=features, sizes=[(20, 90)])
    assert batch.is_real_tile.sum() == 5
    with pytest.raises(ValueError, match="InternVL cuts a picture by its size"):
        processor(None, ["<image>"], features=features)


def test_numbers_of_tiles_that_disagree_are_refused(checkpoint, tmp_path):
    for path in checkpoint.directory.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    name = tmp_path / "preprocessor_config.json"
    name.write_text(json.dumps(json.loads(name.read_text()) | {"max_patches": 6}))
    processor = mj.load(tmp_path)[1]
    with pytest.raises(ValueError, match="put min_dynamic_patch=1 and max_dynamic_patch=6 in"):
        processor([tiny.picture(0)], ["<image>"])
    fields = json.loads((tmp_path / "config.json").read_text()) | {"max_dynamic_patch": 6}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model, processor = mj.load(tmp_path)
    assert model.config.tiles == 7
    processor([tiny.picture(0)], ["<image>"])
