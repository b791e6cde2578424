"""Mistral 3, and Pixtral in LLaVA's format: configs of the hub, and pictures of any size."""

from __future__ import annotations

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families
from mllm_jax import tokens as tok
from mllm_jax.families.mistral3.processor import Mistral3Processor
from tests.helpers import hf, pixtral, tiny

KINDS = ("mistral3", "llava_pixtral")
SHAPES = [
    (24, 24), (60, 40), (40, 60), (200, 8), (8, 200), (1, 100), (100, 1), (48, 48), (33, 77),
    (99, 100), (100, 99), (101, 100), (100, 25), (25, 100), (7, 9), (9, 7), (23, 25), (49, 72),
    (72, 49), (97, 31), (31, 97), (5, 5), (300, 299), (299, 300), (1000, 333), (333, 1000),
    (2, 3), (3, 2), (145, 146), (1, 1),
]  # fmt: skip


def processors(kind, **settings):
    """Theirs and ours."""
    config = families.FAMILIES[kind].config.tiny()
    theirs = pixtral.processor_of(config, **settings)
    return theirs, Mistral3Processor(theirs.tokenizer, lambda: theirs.image_processor, config)


@pytest.mark.parametrize("settings", [{}, {"size": {"height": 40, "width": 90}}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_odd_sizes(kind, settings):
    theirs, ours = processors(kind, **settings)
    factor = ours.config.patch_side * ours.config.merge
    for number, shape in enumerate(s for s in SHAPES if not settings or min(s) > 4):
        pictures = [tiny.picture(number, *shape), tiny.picture(0, 30, 50)]
        want = theirs(images=pictures, text="a [IMG] what [IMG] ?")
        batch = ours([pictures], ["a <image> what <image> ?"])
        np.testing.assert_array_equal(batch.ids[batch.valid], want["input_ids"][0])
        for tile, (height, width) in enumerate(want["image_sizes"]):
            assert tuple(batch.grid[tile] * ours.config.patch_side) == (height, width)
            assert height % factor == width % factor == 0
            pixels = want["pixel_values"][tile][:, :height, :width].transpose(1, 2, 0)
            np.testing.assert_array_equal(ours._tile_pixels(batch, tile), pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_places_of_tokens(kind):
    """Rows and columns of the picture; what stands between rows is text."""
    _, ours = processors(kind)
    pictures = [tiny.picture(0, 24, 40), tiny.picture(1, 16, 16)]
    batch = ours([pictures], ["<image> what <image> ?"])
    map_, image = batch.tokens, batch.tokens.kind[0] == tok.CODE["image"]
    want = [(0, r, c) for r in range(3) for c in range(5)]
    want += [(1, r, c) for r in range(2) for c in range(2)]
    got = zip(map_.tile[0, image], map_.row[0, image], map_.column[0, image], strict=True)
    assert [tuple(map(int, place)) for place in got] == want
    breaks = np.isin(batch.ids[0], ours.tokenizer.convert_tokens_to_ids(list(pixtral.NAMES[5:7])))
    assert breaks.sum() == 5 and (map_.kind[0, breaks] == tok.CODE["question"]).sum() == 0
    assert tok.image.mask(map_).sum() == image.sum() == 19


def test_squares_of_nine_patches(tmp_path):
    """Places for patches are then no power of 2, but whole squares."""
    family = pixtral.checkpoint("mistral3", tmp_path, merge=3)
    model, processor = mj.load(tmp_path, dtype="float32")
    pictures = [[tiny.picture(0, 40, 60)], [tiny.picture(1, 9, 100)]]
    batch = processor(pictures, ["<image> what is it ?", "is <image> it"])
    assert batch.pixels.shape[1] == 57 * 9
    assert processor.feature_places([(40, 60)]) == model.config.pixel_shape[0] == 57 * 9
    given = {k: hf.torch.from_numpy(v) for k, v in family.inputs(batch, pictures).items()}
    with hf.torch.no_grad():
        want = family.network(**given).logits.numpy()[batch.valid]
    got = np.asarray(mj.run(model, batch, logits="all").logits)[batch.valid]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_share_few_programs(kind):
    _, ours = processors(kind)
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 300, (40, 2))
    batches = [ours([tiny.picture(0, *size)], ["<image> a"]) for size in sizes.tolist()]
    assert len({(b.pixels.shape, b.ids.shape) for b in batches}) <= 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize must be true"),
        ({"do_center_crop": True, "crop_size": 8}, "do_center_crop false"),
    ],
)
def test_other_image_processors_are_refused(settings, message):
    _, ours = processors("mistral3", **settings)
    with pytest.raises(ValueError, match=message):
        ours([tiny.picture(0)], ["<image> a"])


def test_a_picture_that_vanishes_is_refused():
    """Theirs fails as well: 1 x 300 pixels would be 0 x 100."""
    theirs, ours = processors("mistral3")
    with pytest.raises(ValueError):
        theirs(images=[tiny.picture(0, 1, 300)], text="[IMG]")
    with pytest.raises(ValueError, match="300 x 1 .* no row or column of pixels left"):
        ours([tiny.picture(0, 1, 300)], ["<image> a"])


PIXTRAL = {  # `mistral-community/pixtral-12b`
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_seq_length": 1,
    "image_token_index": 10,
    "model_type": "llava",
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "is_composition": True,
        "max_position_embeddings": 1024000,
        "model_type": "mistral",
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "vision_config": {
        "head_dim": 64,
        "hidden_act": "silu",
        "image_size": 1024,
        "is_composition": True,
        "model_type": "pixtral",
        "patch_size": 16,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
MISTRAL = {  # `mistralai/Mistral-Small-3.1-24B-Instruct-2503`
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "attention_dropout": 0.0,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "image_size": 1540,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "pixtral",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "rope_theta": 10000.0,
    },
    "vision_feature_layer": -1,
}


def test_configs_of_the_hub():
    assert families.from_hf(PIXTRAL) == families.RELEASED["pixtral-12b"]()
    untied = MISTRAL | {"tie_word_embeddings": False}  # its file has a head, which decides
    assert families.from_hf(untied) == families.RELEASED["mistral-small-3.1-24b"]()
    bare = families.from_hf({"model_type": "mistral3"})
    gelu = MISTRAL["vision_config"] | {"hidden_act": "gelu"}  # by default, not as released
    assert bare == families.from_hf(MISTRAL | {"vision_config": gelu})
    assert bare == families.from_hf(hf.transformers.Mistral3Config().to_dict())


def test_a_llava_of_another_tower_is_a_llava():
    fields = PIXTRAL | {"vision_config": {"model_type": "clip_vision_model"}}
    assert families.of(families.from_hf(fields)).name == "llava"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (PIXTRAL | {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        (PIXTRAL | {"vision_feature_layer": -30}, "vision_feature_layer=-30"),
        (PIXTRAL | {"spatial_merge_size": 2}, "spatial_merge_size"),
        (MISTRAL | {"vision_feature_layer": [-1, -2]}, "vision_feature_layer"),
        (MISTRAL | {"text_config": {"model_type": "ministral3"}}, "ministral3"),
        (MISTRAL | {"text_config": {"model_type": "mixtral"}}, "mixtral"),
        (MISTRAL | {"quantization_config": {"quant_method": "fp8"}}, "quantised by 'fp8'"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        families.from_hf(fields)


def test_keys_of_the_hub_and_of_memory():
    """Old and new spellings are one."""
    canonical = families.FAMILIES["mistral3"].canonical_key
    pairs = {
        "model.vision_tower.ln_pre.weight": "vision_tower.ln_pre.weight",
        "model.multi_modal_projector.norm.weight": "multi_modal_projector.norm.weight",
        "model.language_model.norm.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    }
    assert {key: canonical(key) for key in pairs} == pairs
    assert {key: canonical(key) for key in pairs.values()} == {k: k for k in pairs.values()}
