from __future__ import annotations

import copy
import dataclasses
import random

import pytest

from mllm_jax import families
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next

# config.json of llava-hf/llava-1.5-7b-hf: what equals HF's defaults of the time is not in it.
LLAVA_1_5_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


# config.json of llava-hf/llava-v1.6-vicuna-7b-hf and llava-hf/llava-v1.6-mistral-7b-hf.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NEXT_VICUNA_7B = LLAVA_1_5_7B | {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": PINPOINTS,
    "image_seq_length": 576,
    "model_type": "llava_next",
    "use_image_newline_parameter": True,
}
NEXT_MISTRAL_7B = NEXT_VICUNA_7B | {
    "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
}


def changed(base=LLAVA_1_5_7B, **parts):
    """A config with fields changed: of the whole, `text_config` or `vision_config`."""
    fields = dict(base)
    for name, value in parts.items():
        fields[name] = fields[name] | value if isinstance(fields.get(name), dict) else value
    return fields


def test_llava_1_5_7b():
    assert families.from_hf(LLAVA_1_5_7B) == llava.LlavaConfig.llava_1_5_7b()


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        (NEXT_VICUNA_7B, llava_next.LlavaNextConfig.vicuna_7b()),
        (NEXT_MISTRAL_7B, llava_next.LlavaNextConfig.mistral_7b()),
        (
            changed(NEXT_VICUNA_7B, image_grid_pinpoints=None),
            llava_next.LlavaNextConfig.vicuna_7b(),
        ),
        # A window as long as a row hides nothing.
        (
            changed(
                NEXT_MISTRAL_7B,
                text_config={"sliding_window": 4096, "max_position_embeddings": 4096},
            ),
            llava_next.LlavaNextConfig.mistral_7b(),
        ),
    ],
)
def test_llava_next(fields, known):
    found = families.from_hf(fields)
    assert found == known and type(found) is llava_next.LlavaNextConfig


def test_no_vision_config_is_llavas_own_default():
    fields = {k: v for k, v in LLAVA_1_5_7B.items() if k != "vision_config"}
    assert families.from_hf(fields).vision == llava.ClipConfig.vit_l_14_336()


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(), text_config=transformers.LlamaConfig()
    )
    empty = {"vision_config": {"model_type": "clip_vision_model"}, "text_config": {}}
    assert families.from_hf(hf.to_dict()) == families.from_hf(empty)


def test_defaults_of_llava_next_and_mistral():
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(),
        text_config=transformers.MistralConfig(sliding_window=None),
        image_grid_pinpoints=[[224, 448]],
    )
    empty = {
        "model_type": "llava_next",
        "vision_config": {"model_type": "clip_vision_model"},
        "text_config": {"model_type": "mistral", "sliding_window": None},
        "image_grid_pinpoints": [[224, 448]],
    }
    assert families.from_hf(hf.to_dict()) == families.from_hf(empty)
    given = transformers.MistralConfig()
    del empty["text_config"]["sliding_window"]
    assert families.from_hf(empty).lm.windows == (given.sliding_window,) * given.num_hidden_layers


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_spellings_of_rope(rope):
    assert families.from_hf(changed(text_config=rope)).lm.rope_theta == 5e5


@pytest.mark.parametrize(
    "ours",
    [
        llava.LlavaConfig.tiny(),
        llava.LlavaConfig.embedded(),
        llava_next.LlavaNextConfig.tiny(),
        llava_next.LlavaNextConfig.mistral_7b(),
    ],
)
def test_to_hf_and_back_changes_only_the_unread_layers(ours):
    back = families.from_hf(families.of(ours).to_hf(ours))
    assert back.vision.run_layers == back.vision.layers == ours.vision.run_layers
    assert dataclasses.replace(back, vision=ours.vision) == ours


@pytest.mark.parametrize(
    "fields, words",
    [
        (changed(vision_feature_layr=-1), "vision_feature_layr (nearest: vision_feature_layer)"),
        (changed(text_config={"num_experts": 8}), "unknown field text_config.num_experts"),
        (changed(text_config={"sliding_window": 512}), "text_config.sliding_window=512"),
        (changed(text_config={"mlp_bias": True}), "text_config.mlp_bias=True"),
        (changed(text_config={"hidden_act": "gelu"}), "text_config.hidden_act='gelu'"),
        (changed(text_config={"model_type": "qwen2_moe"}), "text_config.model_type='qwen2_moe'"),
        (
            changed(text_config={"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1}}),
            "text_config.rope_scaling.type='yarn' is not supported, only 'default', 'linear', ",
        ),
        (
            changed(text_config={"rope_parameters": {"rope_theta": 1e4, "partial_factor": 0.5}}),
            "unknown field text_config.rope_parameters.partial_factor",
        ),
        (
            changed(text_config={"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}),
            "two values of rope_theta",
        ),
        (changed(vision_config={"hidden_act": "swiglu"}), "vision_config.hidden_act='swiglu'"),
        (changed(vision_config={"num_channels": 1}), "vision_config.num_channels=1"),
        (changed(vision_config={"model_type": "dinov2"}), "vision_config.model_type='dinov2'"),
        (
            changed(vision_config={"model_type": "siglip_vision_model"}),
            "vision_feature_select_strategy='default' drops the first token",
        ),
        (changed(vision_feature_layer=[-2, -5]), "vision_feature_layer=[-2, -5]"),
        (changed(vision_feature_layer=-30), "the vision tower has 24 layers"),
        (changed(vision_feature_layer=0), "only 1 to 24 or -24 to -1 are supported"),
        (changed(vision_feature_layer=-25), "only 1 to 24 or -24 to -1 are supported"),
        (changed(vision_feature_layer=25), "only 1 to 24 or -24 to -1 are supported"),
        (changed(vision_feature_select_strategy="cls"), "only 'default', 'full'"),
        (changed(quantization_config={"bits": 4}), "quantization_config: weights quantised by"),
        (changed(image_grid_pinpoints=PINPOINTS), "unknown field image_grid_pinpoints"),
        (
            changed(NEXT_VICUNA_7B, image_grid_pinpoints=[[336, 600]]),
            "only pairs of multiples of vision_config.image_size=336",
        ),
        (changed(NEXT_VICUNA_7B, image_grid_pinpoints=[336]), "image_grid_pinpoints=[336]"),
        (changed(NEXT_VICUNA_7B, image_grid_pinpoints=[]), "image_grid_pinpoints=[]"),
        (
            changed(NEXT_VICUNA_7B, use_image_newline_parameter=False),
            "use_image_newline_parameter=False is not supported",
        ),
        (
            changed(NEXT_VICUNA_7B, vision_feature_select_strategy="full"),
            "vision_feature_select_strategy='full' is not supported, only 'default'",
        ),
        ({"model_type": "llama", "hidden_size": 4096}, "model_type='llama' is not supported"),
        ({"model_type": "llava", "mm_vision_tower": "openai/clip"}, "the original LLaVA code"),
    ],
)
def test_refused_by_name(fields, words):
    with pytest.raises(ValueError) as error:
        families.from_hf(fields, "here/config.json")
    assert str(error.value).startswith("here/config.json: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_at_once():
    with pytest.raises(ValueError, match=r"projector_hidden_act='tanh'.*") as error:
        families.from_hf(
            changed(projector_hidden_act="tanh", text_config={"mlp_bias": True, "a": 1})
        )
    assert "text_config.mlp_bias" in str(error.value)
    assert "text_config.a" in str(error.value)


WRONG = [
    None, [], {}, 0, -1, True, "x", "", float("inf"), 10**30, 2.5, [4], [[1, 2]], {"a": 1}, 10**6,
    "a" * 10**5, [[[[1]]]],
]  # fmt: skip


def places(fields):
    """(name, the fields that hold it), of every field at any depth."""
    for name, value in fields.items():
        yield name, fields
        if isinstance(value, dict):
            yield from places(value)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_field_of_another_type_is_refused_in_one_line(name):
    """Of every family, in every part of its config: never an error of Python."""
    family, draw = families.FAMILIES[name], random.Random(name)
    known = family.to_hf(next(iter(family.released.values()))())
    for number in range(len(list(places(known)))):
        for value in draw.sample(WRONG, 6):
            fields = copy.deepcopy(known)
            field, holder = list(places(fields))[number]
            holder[field] = value
            try:
                families.from_hf(fields, "model/config.json")
            except ValueError as error:
                message = str(error)
                assert "model/config.json" in message and len(message) < 400, (field, value)
                assert message.isprintable(), (field, value)
