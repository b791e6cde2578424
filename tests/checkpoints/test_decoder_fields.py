"""The `text_config` of every text model, read and written back."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mllm_jax.checkpoints.networks import decoder
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava import sharding
from mllm_jax.models.rotary import RopeScaling, RopeSections
from mllm_jax.sharding import rules
from tests.helpers import hf
from tests.models import text_models as text

transformers = hf.transformers
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen2_vl_text": text.Q2VL,
    "qwen2_5_vl_text": text.Q25VL,
    "qwen3_vl_text": text.Q3VL,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}


def read(fields, **how):
    problems: list[str] = []
    lm = decoder.config(decoder.read(fields, problems, prefix="", **how))
    return lm, problems


def well(fields) -> llava.DecoderConfig:
    lm, problems = read(fields)
    assert not problems, problems
    return lm


@pytest.mark.parametrize("name", CONFIGS)
def test_defaults_are_those_of_transformers(name):
    assert set(CONFIGS) == set(decoder.TYPES)
    sections = {"rope_scaling": {"mrope_section": [16, 24, 24]}} if "qwen2_" in name else {}
    sections = {"rope_scaling": {"mrope_section": [24, 20, 20]}} if "qwen3_" in name else sections
    assert well(CONFIGS[name](**sections).to_dict()) == well({"model_type": name})


@pytest.mark.parametrize("name", text.MODELS)
def test_written_fields_are_the_same_model_in_transformers(name):
    theirs, ours = text.pair(name)
    fields = decoder.to_hf(ours.config.lm)
    kind, network, _ = text.MODELS[name]
    if name == "qwen2-vl":
        assert fields["model_type"] == "qwen2_5_vl_text"
        fields["model_type"] = "qwen2_vl_text"
    assert fields["model_type"] == kind.model_type
    config = kind(**fields, pad_token_id=None, attn_implementation="eager")
    assert well(config.to_dict()) == ours.config.lm == well(fields)
    again = network(config).eval()
    again.load_state_dict(theirs.state_dict())
    ids = text.torch.arange(24).reshape(2, 12)
    with text.torch.no_grad():
        got, want = (n(input_ids=ids).logits for n in (again, theirs))
    np.testing.assert_array_equal(got, want)


def test_parts_that_no_model_of_transformers_has():
    lm = llava.DecoderConfig.tiny()
    for change, words in (
        ({"act": "gelu"}, "act='gelu'"),
        ({"windows": (4, 0, 4, 0)}, "windows=(4, 0, 4, 0)"),
        ({"embedding_scale": 2.0}, "embedding_scale=2.0"),
        ({"qk_norm": True, "biases": "qkv"}, "biases='qkv'"),
    ):
        with pytest.raises(ValueError) as error:
            decoder.to_hf(dataclasses.replace(lm, **change))
        assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", text.MODELS)
def test_every_parameter_has_one_sharding_rule_and_one_key(name):
    _, ours = text.pair(name)
    config = ours.config
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))))
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in state]
    paths = [path for path in paths if path.startswith("lm.")]
    assert set(rules.match(paths, sharding.sharding_rules(config))) == set(paths)
    table = decoder.table(config.lm, "model", "lm_head")
    assert set(paths) <= {row.path for row in table}
    assert len({row.path for row in table}) == len(table) == len({row.key for row in table})


QWEN2_5_VL = {  # config.json of Qwen/Qwen2.5-VL-7B-Instruct, without its tower
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "image_token_id": 151655,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {"depth": 32},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


def test_fields_at_the_root():
    whole, fields = decoder.nested(QWEN2_5_VL, "qwen2_5_vl_text")
    assert {"vision_config", "image_token_id", "tie_word_embeddings", "bos_token_id"} < set(whole)
    assert not {"hidden_size", "rope_scaling", "sliding_window"} & set(whole)
    lm = well(fields)
    assert (lm.layers, lm.width, lm.heads, lm.kv_heads, lm.vocab) == (28, 3584, 28, 4, 152064)
    assert lm.rope_sections == RopeSections((16, 24, 24)) and lm.rope_theta == 1e6
    assert lm.biases == "qkv" and not lm.windows and lm.eps == 1e-6
    own = {name: fields[name] for name in fields if name not in ("model_type", "rope_scaling")}
    own["rope_parameters"] = {"rope_type": "default", "type": "default"}
    own["rope_parameters"] |= {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    for root in ({}, QWEN2_5_VL | {"hidden_size": 7}):  # some have both: the nested ones count
        whole, fields = decoder.nested(root | {"text_config": own}, "qwen2_5_vl_text")
        assert well(fields) == lm and "hidden_size" not in whole


GEMMA3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
GEMMA3_270M = {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2,
    "dtype": "bfloat16", "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "initializer_range": 0.02,
    "intermediate_size": 2048, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
    "transformers_version": "4.55.0", "use_bidirectional_attention": False, "use_cache": True,
    "vocab_size": 262144,
}  # fmt: skip


def test_gemma_3():
    lm = well(GEMMA3_4B)
    assert lm.windows == ((1024,) * 5 + (0,)) * 5 + (1024,) * 4
    assert lm.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert (lm.rope_theta, lm.local_rope_theta) == (1e6, 1e4)
    assert lm.unit_offset and lm.post_norms and lm.qk_norm and lm.tied
    assert (lm.act, lm.embedding_scale, lm.heads, lm.kv_heads) == ("gelu_tanh", 2560**0.5, 8, 4)
    small = well(GEMMA3_270M)
    assert small.windows == ((512,) * 5 + (0,)) * 3 and small.rope_scaling is None
    pattern = {n: v for n, v in GEMMA3_270M.items() if n != "layer_types"}
    assert well(pattern | {"sliding_window_pattern": 6}) == small
    for fields in (GEMMA3_4B, GEMMA3_270M):
        assert well(transformers.Gemma3TextConfig(**fields).to_dict()) == well(fields)


def test_paligemma():
    first = {
        "hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma",
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_image_tokens": 256,
        "num_key_value_heads": 1, "torch_dtype": "float32", "vocab_size": 257216,
        "hidden_act": "gelu",
    }  # fmt: skip
    lm = well(first)
    assert (lm.act, lm.head_width, lm.query_scale, lm.tied) == ("gelu_tanh", 256, None, True)
    second = first | {
        "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 224,
        "sliding_window": 4096, "cache_implementation": "hybrid",
    }  # fmt: skip
    lm = well(second)
    assert lm.windows == (4096, 0) * 9 and lm.query_scale == 224**-0.5
    assert (lm.attention_softcap, lm.logit_softcap) == (50.0, 30.0)
    assert not lm.window_within_block


MISTRAL = {"model_type": "mistral"}
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 2}
LLAMA_31 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip


def test_spellings():
    lm = well({"rope_theta": 5e5, "rope_scaling": LLAMA_31})
    assert lm.rope_scaling == RopeScaling(kind="llama3", factor=8.0)
    assert lm == well({"rope_parameters": LLAMA_31 | {"rope_theta": 5e5}})
    short = {n: v for n, v in LLAMA_31.items() if n != "original_max_position_embeddings"}
    lm = well({"rope_scaling": short, "max_position_embeddings": 77})
    assert lm.rope_scaling.original_length == 77
    assert well({"rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling.factor == 2.0
    assert well(MISTRAL).windows == (4096,) * 32
    assert well(MISTRAL | {"sliding_window": None}).windows == ()
    sliding = QWEN2 | {"use_sliding_window": True, "sliding_window": 7}
    assert well(sliding | {"max_window_layers": 1}).windows == (0, 7)
    kinds = ["sliding_attention", "full_attention"]
    assert well(sliding | {"layer_types": kinds}).windows == (7, 0)
    assert well(QWEN2 | {"sliding_window": 7, "max_window_layers": 0}).windows == ()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is not supported, only 'llama', "),
        ({"model_type": "gemma3n_text"}, "model_type='gemma3n_text' is not supported"),
        ({"num_local_experts": 8}, "unknown field num_local_experts"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights quantised by 'awq'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type='dynamic'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [1]}},
            "rope_parameters.rope_type='longrope' is not supported, only 'default', 'linear', ",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "rope_scaling.type="),
        ({"rope_scaling": {"type": "linear"}}, "of type 'linear' lacks factor"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling has factor=8.0 but no rope_type"),
        ({"rope_scaling": LLAMA_31 | {"low_freq_factor": None}}, "lacks low_freq_factor"),
        ({"rope_scaling": LLAMA_31 | {"low_freq_factor": 4.0}}, "low_freq_factor=4.0 not below"),
        (
            {"rope_scaling": LLAMA_31, "rope_parameters": {"rope_theta": 1e4}},
            "rope_scaling and rope_parameters differ",
        ),
        (
            {"model_type": "qwen2_vl_text", "rope_scaling": {"mrope_section": [16, 24, 23]}},
            "mrope_section=[16, 24, 23] must add up to 64",
        ),
        (
            {"model_type": "qwen3_vl_text", "rope_scaling": {"mrope_interleaved": False}},
            "mrope_interleaved=False is not supported",
        ),
        ({"model_type": "qwen2_vl_text", "head_dim": 64}, "head_dim=64 is not supported"),
        (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types has 1 layers of 2"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 2}, "no sliding_window is used"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attent"),
        (GEMMA3_270M | {"sliding_window": None}, "no sliding_window is used"),
        (GEMMA3_270M | {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters.rope_theta"),
        (
            GEMMA3_270M
            | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "scaling in layers with a window is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"model_type": ["llama"]}, "model_type=['llama'] is not supported"),
    ],
)
def test_refused_by_name(fields, words):
    _, problems = read(fields)
    assert any(words in problem for problem in problems), problems
    assert len("; ".join(problems)) < 600 and "\n" not in "".join(problems)
