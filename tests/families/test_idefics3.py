"""Idefics3 and SmolVLM: configs of the hub, how pictures are cut, and what stands around tiles."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families
from mllm_jax import tokens as tok
from mllm_jax.data import features as features_
from mllm_jax.families.idefics3.processor import Idefics3Processor
from mllm_jax.processors.rows import Picture
from tests.helpers import hf, idefics3, tiny
from tests.helpers.random_inputs import random_model

CONFIG = families.FAMILIES["idefics3"].config.tiny()
SHAPES = [
    (24, 24), (60, 40), (40, 60), (200, 8), (8, 200), (1, 100), (100, 1), (48, 48), (33, 77),
    (71, 72), (72, 71), (73, 72), (72, 25), (25, 72), (24, 72), (72, 24), (23, 25), (49, 72),
    (72, 49), (97, 31), (31, 97), (5, 5), (300, 299), (299, 300), (1000, 333), (333, 1000),
    (2, 3), (3, 2), (145, 146), (64, 64), (1, 1),
]  # fmt: skip
SETTINGS = [
    {},
    {"size": {"longest_edge": 97}},  # odd, and no multiple of a tile
    {"size": {"longest_edge": 24}},  # never cut
    {"do_image_splitting": False},
    {"do_resize": False},
]


def processors(**settings):
    """Theirs and ours."""
    theirs = idefics3.processor_of(CONFIG, **settings)
    theirs.tokenizer.chat_template = idefics3.TEMPLATE
    return theirs, Idefics3Processor(theirs.tokenizer, lambda: theirs.image_processor, CONFIG)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pictures_of_odd_sizes(settings):
    theirs, ours = processors(**settings)
    few = [shape for shape in SHAPES if max(shape) <= 100]
    for number, shape in enumerate(few if "do_resize" in settings else SHAPES):
        pictures = [tiny.picture(number, *shape), tiny.picture(0, 30, 50)]
        text = "a <image> what <image> ?"
        want = theirs(images=pictures, text=text, return_tensors="np")
        batch = ours([pictures], [text])
        np.testing.assert_array_equal(batch.ids[batch.valid], want["input_ids"][0])
        pixels = batch.pixels[batch.is_real_tile].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(pixels, want["pixel_values"][0])
        layout = ours.layout(shape)
        assert layout.tiles == np.prod(layout.tile_grid) + 1


def test_the_largest_released_picture():
    """17 tiles of real sizes, as `get_number_of_image_patches` counts them for whole tiles."""
    config = families.RELEASED["smolvlm-256m"]()
    images = hf.transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    )
    for size in ((2048, 2048), (100, 100), (1024, 512), (480, 640), (3000, 10)):
        count, rows, columns = images.get_number_of_image_patches(*size)
        layout = config.layout(size)
        assert (layout.tiles, layout.tile_grid) == (count, (rows, columns))
    assert config.tiles == 17 and len(config.layout().patches) == 17 * 64


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 2), (3, 2)])
def test_the_text_of_a_picture(rows, columns):
    """As SmolVLM's processor writes it, which cannot be made without torchvision."""
    smolvlm = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    names = ("<fake_token_around_image>", "<image>", "<global-img>")
    want = smolvlm.get_image_prompt_string(rows, columns, 1, *names)
    _, ours = processors()
    layout = CONFIG.layout_of_tiles((rows, columns))
    assert ours.picture_text(Picture(None, layout)) == want


def test_places_of_tokens():
    """Tiles count through the row; each is a square; the names of places are text."""
    _, ours = processors()
    pictures = [tiny.picture(0, 48, 72), tiny.picture(1, 72, 24)]
    map_ = ours([pictures], ["<image> what <image> ?"]).tokens
    image = map_.kind[0] == tok.CODE["image"]
    grids = [(2, 3), (3, 1)]
    tiles = sum(rows * columns + 1 for rows, columns in grids)
    want = [(t, r, c) for t, r, c in itertools.product(range(tiles), range(2), range(2))]
    got = zip(map_.tile[0, image], map_.row[0, image], map_.column[0, image], strict=True)
    assert [tuple(map(int, place)) for place in got] == want
    assert (map_.tile[0, ~image] == -1).all()


def test_rows_share_few_numbers_of_tiles():
    _, ours = processors()
    shapes = [s for s in SHAPES if max(s) <= 300]
    batches = [ours([tiny.picture(0, *shape)], ["<image> a"]) for shape in shapes]
    assert len({batch.pixels.shape for batch in batches}) <= 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_image_size": {"longest_edge": 12}}, "max_image_size cuts tiles of 12 pixels"),
        ({"size": {"height": 24, "width": 24}}, "only longest_edge is supported"),
    ],
)
def test_other_image_processors_are_refused(settings, message):
    _, ours = processors(**settings)
    with pytest.raises(ValueError, match=message):
        ours([tiny.picture(0)], ["<image> a"])


def test_features_need_sizes():
    _, ours = processors()
    with pytest.raises(ValueError, match="cuts a picture by its size"):
        ours(None, ["<image> a"], features=np.zeros((1, 17, 1), np.float32))


def test_features_are_pixels():
    """Stored features of two pictures, of all places for tiles, give the same batch."""
    _, ours = processors()
    pictures = [tiny.picture(0, 48, 72), tiny.picture(1, 20, 20)]
    want = ours(pictures, ["<image> a", "<image> what ?"])
    model = random_model(CONFIG)
    features = np.asarray(features_.encode_pictures(model, want.replace(processor=None)))
    places = CONFIG.tiles * CONFIG.vision.feature_tokens
    slots = features.reshape(2, -1, features.shape[-1])
    slots = np.pad(slots, ((0, 0), (0, places - slots.shape[1]), (0, 0)))
    got = ours(None, ["<image> a", "<image> what ?"], features=slots, sizes=[(48, 72), (20, 20)])
    np.testing.assert_array_equal(got.ids, want.ids)
    one, two = (mj.run(model, batch).logits for batch in (want, got))
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


SMOLVLM = {  # `HuggingFaceTB/SmolVLM-Instruct`, without what is said twice
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_seq_len": 81,
    "image_token_id": 49153,
    "model_type": "idefics3",
    "scale_factor": 3,
    "text_config": {
        "_flash_attn_2_enabled": True,
        "architectures": ["VLlama3ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "is_llama_config": True,
        "max_position_embeddings": 16384,
        "mlp_bias": False,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "pad_token_id": 2,
        "perceiver_config": {"model_type": "vllama3", "resampler_depth": 6},
        "pixel_shuffle_factor": 3,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 273768.0,
        "tie_word_embeddings": True,  # counts for nothing
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        "use_cache": True,
        "use_resampler": False,
        "vocab_size": 49155,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"use_external_data_format": True},
    "transformers_version": "4.46.0",
    "use_cache": True,
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "max_image_size": {"longest_edge": 384},
        "model_type": "idefics3",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "size": {"longest_edge": 1920},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    },
    "vocab_size": 49155,
}


def test_config_of_the_hub():
    assert families.from_hf(SMOLVLM) == families.RELEASED["smolvlm-2.2b"]()
    second = SMOLVLM | {"model_type": "smolvlm", "use_reentrant_checkpointing": False}
    second["vision_config"] = SMOLVLM["vision_config"] | {"model_type": "smolvlm_vision"}
    second["text_config"] = SMOLVLM["text_config"] | {"vocab_size": 49280}
    second["image_token_id"] = 49190
    assert families.from_hf(second) == families.RELEASED["smolvlm2-2.2b"]()


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_defaults_are_theirs(kind):
    made = getattr(hf.transformers, f"{idefics3.CLASS[kind]}Config")
    bare = families.from_hf({"model_type": kind, "vision_config": {"patch_size": 16}})
    told = made(vision_config={"patch_size": 16}).to_dict()
    assert bare == families.from_hf(told)
    text = {"hidden_size": 4096, "model_type": "llama"}  # then with another epsilon
    fields = {"model_type": kind, "vision_config": {"patch_size": 16}, "text_config": text}
    told = made(vision_config={"patch_size": 16}, text_config=dict(text)).to_dict()
    assert families.from_hf(fields) == families.from_hf(told)
    assert (bare.lm.eps, families.from_hf(fields).lm.eps) == (1e-5, 1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_factor": 4}, "scale_factor=4"),
        ({"text_config": {"model_type": "mixtral"}}, "mixtral"),
        ({"text_config": {"qk_layer_norms": True}}, "qk_layer_norms"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by 'bitsandbytes'"),
        ({"perceiver_depth": 3}, "unknown field perceiver_depth"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        families.from_hf(SMOLVLM | fields)
