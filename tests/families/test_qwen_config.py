"""The `config.json` and the keys of the Qwens, in all forms that are in the wild."""

from __future__ import annotations

import json

import pytest

from mllm_jax import families
from mllm_jax.families.qwen2_5_vl import keys as qwen
from mllm_jax.families.qwen3_vl import keys as qwen3

# config.json of Qwen/Qwen2-VL-2B-Instruct: the fields of the language model are at its root.
QWEN2_VL_2B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
# config.json of Qwen/Qwen2.5-VL-7B-Instruct.
QWEN2_5_VL_7B = {name: value for name, value in QWEN2_VL_2B.items() if name != "sliding_window"} | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "vocab_size": 152064,
}
# config.json of Qwen/Qwen3-VL-4B-Instruct.
QWEN3_VL_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
FILES = {
    "qwen2-vl-2b": QWEN2_VL_2B,
    "qwen2.5-vl-7b": QWEN2_5_VL_7B,
    "qwen3-vl-4b": QWEN3_VL_4B,
}


def released(name):
    return families.RELEASED[name]()


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_hub(name):
    assert families.from_hf(FILES[name]) == released(name)


@pytest.mark.parametrize("name", FILES)
def test_as_transformers_writes_them(name):
    """Nested, with `rope_parameters`; and with the fields of the language model in both places."""
    transformers = pytest.importorskip("transformers")
    fields = json.loads(json.dumps(FILES[name]))
    hf = transformers.CONFIG_MAPPING[fields.pop("model_type")](**fields)
    written = json.loads(hf.to_json_string(use_diff=False))
    assert families.from_hf(written) == released(name)
    both = {**FILES[name], **written, "hidden_size": 77}
    if name != "qwen3-vl-4b":  # it has never had them at its root
        assert families.from_hf(both) == released(name)


@pytest.mark.parametrize("folder", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_defaults_are_those_of_transformers(folder):
    """But for the tower of Qwen2.5-VL, whose default no LM can read."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 8192} if folder == "qwen2_vl" else {"out_hidden_size": 8192}
    text = {"hidden_size": 8192}
    if folder == "qwen3_vl":
        text |= {"num_key_value_heads": 8}
    parts = {"vision_config": vision, "text_config": text}
    hf = transformers.CONFIG_MAPPING[folder](**json.loads(json.dumps(parts)))
    written = json.loads(hf.to_json_string(use_diff=False))
    assert families.from_hf(written) == families.from_hf({"model_type": folder, **parts})


@pytest.mark.parametrize("name", [n for n in families.RELEASED if n.startswith("qwen")])
def test_released_configs_are_written_and_read(name):
    config = released(name)
    fields = json.loads(json.dumps(families.of(config).to_hf(config)))
    assert families.from_hf(fields) == config


@pytest.mark.parametrize("folder", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_tower_of_the_default_rotary_type(folder):
    """In transformers this is another name of the one type that towers have."""
    transformers = pytest.importorskip("transformers")
    family = families.FAMILIES[folder]
    fields = json.loads(json.dumps(family.to_hf(family.config.tiny())))
    fields["vision_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
    assert families.from_hf(fields).vision.theta == 50.0
    hf = transformers.CONFIG_MAPPING[fields.pop("model_type")](**fields)
    assert hf.vision_config.rope_parameters == {"rope_type": "axial", "rope_theta": 50.0}


@pytest.mark.parametrize(
    ("root", "text", "tied"),
    [(True, False, True), (False, True, True), (None, True, True), (False, False, False)],
)
def test_either_flag_ties_the_head_of_qwen2(root, text, tied):
    """As transformers takes them; Qwen3-VL reads the root alone."""
    transformers = pytest.importorskip("transformers")
    for name, want in (("qwen2.5-vl-7b", tied), ("qwen3-vl-4b", bool(root))):
        config = released(name)
        fields = families.of(config).to_hf(config) | {"tie_word_embeddings": root}
        fields["text_config"] |= {"tie_word_embeddings": text}
        if root is None:
            del fields["tie_word_embeddings"]
        assert families.from_hf(fields).lm.tied is want
        kind = transformers.CONFIG_MAPPING[fields.pop("model_type")]
        assert kind(**json.loads(json.dumps(fields))).tie_word_embeddings is want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by 'awq' are not read"),
        ({"audio_config": {}}, "unknown field audio_config"),
        ({"model_type": "qwen3_vl_moe"}, "model_type='qwen3_vl_moe' is not supported"),
        ({"model_type": "qwen2_5_omni"}, "model_type='qwen2_5_omni' is not supported"),
        ({"hidden_size": 7168}, "tokens of width 3584, but the language model reads hidden_size"),
        ({"vision_config": {"window_size": 100}}, r"patch_size x spatial_merge_size"),
        ({"vision_config": {"temporal": 1}}, "unknown field vision_config.temporal"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]}}, "must add up to 64"),
        ({"num_experts": 60}, "unknown field num_experts"),
    ],
)
def test_refused_by_name(changes, message):
    fields = {
        **QWEN2_5_VL_7B,
        **changes,
        "vision_config": QWEN2_5_VL_7B["vision_config"] | changes.get("vision_config", {}),
    }
    with pytest.raises(ValueError, match=message) as error:
        families.from_hf(fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight", None),
        ("visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight", None),
        ("model.language_model.norm.weight", "model.norm.weight", None),
        ("language_model.model.norm.weight", "model.norm.weight", None),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight", None),
        ("lm_head.weight", "lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.layers.0.x", "model.layers.0.x", None),
        ("something.else", "something.else", "something.else"),
    ],
)
def test_spellings(key, old, new):
    assert qwen.canonical_key(key) == old
    nested = old.replace("model.", "model.language_model.", 1) if old[0] == "m" else f"model.{old}"
    assert qwen3.canonical_key(key) == (new or nested)
    assert qwen3.canonical_key(new or nested) == (new or nested)


def test_the_projector_is_the_merger_with_those_of_deepstack():
    family = families.FAMILIES["qwen3_vl"]
    table = family.key_table(family.config.tiny())
    of_projector = {row.key for row in table if family.is_projector(row.key)}
    assert of_projector == {row.key for row in table if row.path.startswith("projector.")}
    assert any("deepstack_merger_list" in key for key in of_projector)
