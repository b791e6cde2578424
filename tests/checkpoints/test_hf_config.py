from __future__ import annotations

import pytest

from mllm_jax.checkpoints import config
from mllm_jax.models import llava

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


def changed(**parts):
    """LLAVA_1_5_7B with fields changed: of the whole, `text_config` or `vision_config`."""
    fields = dict(LLAVA_1_5_7B)
    for name, value in parts.items():
        fields[name] = fields[name] | value if isinstance(fields.get(name), dict) else value
    return fields


def test_llava_1_5_7b():
    assert config.from_hf(LLAVA_1_5_7B) == llava.LlavaConfig.llava_1_5_7b()


def test_no_vision_config_is_llavas_own_default():
    fields = {k: v for k, v in LLAVA_1_5_7B.items() if k != "vision_config"}
    assert config.from_hf(fields).vision == llava.ClipConfig.vit_l_14_336()


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(), text_config=transformers.LlamaConfig()
    )
    empty = {"vision_config": {"model_type": "clip_vision_model"}, "text_config": {}}
    assert config.from_hf(hf.to_dict()) == config.from_hf(empty)


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
    assert config.from_hf(changed(text_config=rope)).lm.rope_theta == 5e5


@pytest.mark.parametrize("tiny", [llava.LlavaConfig.tiny(), llava.LlavaConfig.embedded()])
def test_to_hf_and_back_changes_only_the_unread_layers(tiny):
    back = config.from_hf(config.to_hf(tiny))
    assert back.vision.run_layers == back.vision.layers == tiny.vision.run_layers
    assert (back.projector, back.lm, back.image_token) == (
        tiny.projector,
        tiny.lm,
        tiny.image_token,
    )


@pytest.mark.parametrize(
    "fields, words",
    [
        (changed(vision_feature_layr=-1), "vision_feature_layr (nearest: vision_feature_layer)"),
        (changed(text_config={"num_experts": 8}), "unknown field text_config.num_experts"),
        (changed(text_config={"sliding_window": 512}), "text_config.sliding_window=512"),
        (changed(text_config={"attention_bias": True}), "text_config.attention_bias=True"),
        (changed(text_config={"hidden_act": "gelu"}), "text_config.hidden_act='gelu'"),
        (changed(text_config={"model_type": "qwen2"}), "text_config.model_type='qwen2'"),
        (
            changed(text_config={"rope_scaling": {"type": "linear", "factor": 2.0}}),
            "text_config.rope_scaling of type 'linear'",
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
        (changed(vision_config={"model_type": "siglip_vision_model"}), "siglip_vision_model"),
        (changed(vision_feature_layer=[-2, -5]), "vision_feature_layer=[-2, -5]"),
        (changed(vision_feature_layer=-30), "the vision tower has 24 layers"),
        (changed(vision_feature_select_strategy="cls"), "only default, full"),
        (changed(quantization_config={"bits": 4}), "unknown field quantization_config"),
        ({"model_type": "llama", "hidden_size": 4096}, "model_type='llama' is not supported"),
        ({"model_type": "llava", "mm_vision_tower": "openai/clip"}, "the original LLaVA code"),
    ],
)
def test_refused_by_name(fields, words):
    with pytest.raises(ValueError) as error:
        config.from_hf(fields, "here/config.json")
    assert str(error.value).startswith("here/config.json: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_at_once():
    with pytest.raises(ValueError, match=r"projector_hidden_act='tanh'.*") as error:
        config.from_hf(changed(projector_hidden_act="tanh", text_config={"mlp_bias": True, "a": 1}))
    assert "text_config.mlp_bias" in str(error.value)
    assert "text_config.a" in str(error.value)
