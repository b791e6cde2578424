"""PaliGemma: prompts that look forward, answers that do not, as transformers has both."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families
from mllm_jax.families.paligemma.model import PaliGemmaConfig
from tests.helpers import hf, paligemma, tiny

ANSWERS = ["a red cat", "yes"]
PICTURES = [[tiny.picture(0, 30, 20)], [tiny.picture(1, 9, 50), tiny.picture(2, 24, 24)]]
PROMPTS = ["what is it ?", "which one is a dog : first or second ?"]

# config.json of google/paligemma-3b-pt-224 and google/paligemma2-3b-pt-224.
PALIGEMMA = {
    "_vocab_size": 257152,
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 257216,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.41.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "torch_dtype": "float32",
        "vision_use_head": False,
    },
}
PALIGEMMA_2 = PALIGEMMA | {
    "hidden_size": 2304,
    "projection_dim": 2304,
    "text_config": {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_size": 2304,
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": 9216,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_image_tokens": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "use_bidirectional_attention": True,
        "vocab_size": 257216,
    },
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return paligemma.checkpoint(2, tmp_path_factory.mktemp("paligemma2"))


@pytest.fixture(scope="module")
def loaded(family):
    return mj.load(family.directory, dtype=jnp.float32)


def test_configs_of_the_hub():
    assert families.from_hf(PALIGEMMA) == PaliGemmaConfig.gemma_2b()
    assert families.from_hf(PALIGEMMA_2) == PaliGemmaConfig.gemma2_2b()


def test_defaults_are_those_of_transformers():
    theirs = hf.transformers.PaliGemmaConfig()
    ours = families.from_hf({"model_type": "paligemma"})
    assert families.from_hf(theirs.to_dict()) == ours
    assert (ours.vision.mlp, ours.lm.layers, ours.lm.tied) == (4096, 18, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection_dim": 2000}, "projection_dim=2000 is not text_config.hidden_size=2048"),
        ({"text_config": {"model_type": "gemma3_text"}}, "gemma3_text"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "clip_vision_model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by"),
        ({"projector_act": "gelu"}, "unknown field projector_act"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        families.from_hf(PALIGEMMA | fields)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("prompt", [*PROMPTS, "", "<image>", "<image><image> a cat"])
def test_prompts_and_answers_are_theirs(prompt, family, loaded):
    """The begin after the last picture, the newline before the answer, the end after it."""
    pictures = PICTURES[1] if prompt.count("<image>") == 2 else PICTURES[0]
    want = family.processor(
        images=[pictures], text=[prompt], suffix=["a red cat"], return_tensors="np"
    )
    batch = loaded[1]([pictures], [prompt], answers=["a red cat"])
    np.testing.assert_array_equal(batch.ids[batch.valid], want["input_ids"][0])
    is_answer = batch.tokens.kind == mj.tokens.CODE["answer"]
    np.testing.assert_array_equal(is_answer[batch.valid], want["token_type_ids"][0])
    np.testing.assert_array_equal(
        batch.pixels[batch.is_real_tile], want["pixel_values"].transpose(0, 2, 3, 1)
    )
    words = loaded[1].tokenizer.convert_ids_to_tokens(
        batch.ids[batch.tokens.kind == mj.tokens.CODE["question"]]
    )
    assert words == prompt.replace("<image>", "").split()


@pytest.mark.parametrize("left", [False, True])
def test_the_prompt_looks_forward_and_the_answer_does_not(left, family, loaded):
    batch = loaded[1](PICTURES, PROMPTS, answers=ANSWERS, left=left, rows=3)
    given = family.inputs(batch, PICTURES)
    assert given["token_type_ids"].any() and not given["token_type_ids"].all()
    with hf.torch.no_grad():
        given = {name: hf.torch.from_numpy(value) for name, value in given.items()}
        want = family.network(**given).logits.numpy()
    got = np.asarray(mj.run(loaded[0], batch, logits="all").logits)
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-4)
    causal = mj.run(loaded[0], batch.replace(block=None), logits="all").logits
    assert np.abs(np.asarray(causal) - got)[batch.valid].max() > 0.1


def test_scores_are_those_of_answers_one_by_one(family, loaded):
    batch = loaded[1](PICTURES, PROMPTS)
    scores = np.asarray(mj.score(loaded[0], batch, ["yes", "a red cat"]))
    for number, answer in enumerate(["yes", "a red cat"]):
        whole = loaded[1](PICTURES, PROMPTS, answers=[answer] * 2)
        given = family.inputs(whole, PICTURES)
        with hf.torch.no_grad():
            given = {name: hf.torch.from_numpy(value) for name, value in given.items()}
            logits = hf.torch.log_softmax(family.network(**given).logits, -1).numpy()
        is_answer = whole.tokens.kind == mj.tokens.CODE["answer"]
        want = [
            sum(logits[row, at - 1, whole.ids[row, at]] for at in np.flatnonzero(is_answer[row]))
            for row in range(2)
        ]
        np.testing.assert_allclose(scores[:, number], want, rtol=0, atol=1e-4)


def test_pack_is_refused(loaded):
    with pytest.raises(ValueError, match="attends to the question after it"):
        loaded[1].pack([PICTURES[0]], [[("what is it ?", "a cat")]])


def test_a_window_hides_nothing_within_the_prompt(loaded):
    """As PaliGemma 2 was trained: its window shows only where an answer is longer."""
    model, processor = loaded
    batch = processor(PICTURES, PROMPTS)
    config = dataclasses.replace(model.config.lm, windows=(4, 0, 4, 0))
    given = batch, batch.replace(block=None)
    prompt, causal = (np.asarray(mj.run(model, b).logits) for b in given)
    model.lm.config, before = config, model.lm.config
    try:
        narrow, narrow_causal = (np.asarray(mj.run(model, b).logits) for b in given)
    finally:
        model.lm.config = before
    np.testing.assert_array_equal(prompt, narrow)
    assert np.abs(causal - narrow_causal).max() > 0.01
