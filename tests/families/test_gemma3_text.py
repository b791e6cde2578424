"""A language model alone: what reads text of it, and what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families
from mllm_jax import sites as S
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.planning import plan
from tests.helpers import gemma, hf, tiny

PROMPTS = ["what is it ? a cat or dog or ship or tree", "yes no", "which kind : red"]
STEPS = 32
# config.json of google/gemma-3-1b-it and google/gemma-3-270m-it.
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA_3_270M = GEMMA_3_1B | {
    "_sliding_window_pattern": 6,
    "eos_token_id": 1,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "num_hidden_layers": 18,
    "use_bidirectional_attention": False,
}


@pytest.mark.parametrize(
    ("fields", "name", "parameters"),
    [
        (GEMMA_3_1B, "gemma-3-1b", 999_885_952),
        (GEMMA_3_270M, "gemma-3-270m", 268_098_176),
    ],
)
def test_released_configs(fields, name, parameters):
    config = families.from_hf(fields)
    assert config == families.RELEASED[name]()
    assert families.from_hf(families.of(config).to_hf(config)) == config
    assert hf.count(config) == parameters


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (GEMMA_3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA_3_1B | {"num_experts": 4}, "unknown field num_experts"),
        (GEMMA_3_1B | {"hidden_activation": "swiglu"}, "hidden_activation='swiglu'"),
    ],
)
def test_refused_by_name(fields, words):
    with pytest.raises(ValueError) as error:
        families.from_hf(fields, "here/config.json")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return gemma.text_checkpoint(tmp_path_factory.mktemp("gemma3_text"))


@pytest.fixture(scope="module")
def loaded(family):
    return mj.load(family.directory, dtype=jnp.float32)


def given(family, batch):
    return {k: hf.torch.from_numpy(v) for k, v in family.inputs(batch, []).items()}


@pytest.mark.parametrize("pad", ["left", "right"])
def test_every_site(pad, family, loaded):
    model, processor = loaded
    assert model.config == family.config
    batch = processor(None, PROMPTS, rows=4, left=pad == "left")
    names = set(site_shapes(model, batch)) - {site.name for site in S.MASKS}
    assert {name.split(".")[0] for name in names} == {"lm", "logits"} and len(names) == 17
    inputs = family.inputs(batch, [])
    hf.assert_equal(model, batch, hf.tensors(family.network, names, where=family.where, **inputs))


def test_greedy_generation(family, loaded):
    model, processor = loaded
    left, right = (processor(None, PROMPTS, left=left) for left in (True, False))
    inputs = given(family, left)
    del inputs["position_ids"]
    family.network.generation_config.eos_token_id = None
    with hf.torch.no_grad():
        want = family.network.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, pad_token_id=0
        ).numpy()[:, -STEPS:]  # fmt: skip
    assert len(np.unique(want)) > 8
    got = mj.generate(model, right, max_new_tokens=STEPS).tokens
    np.testing.assert_array_equal(np.asarray(got), want)


def test_score(family, loaded):
    """The log-likelihood of each answer, one row at a time in transformers."""
    model, processor = loaded
    answers = ["a cat", "dog or ship", "no"]
    batch = processor(None, PROMPTS)
    got = np.asarray(mj.score(model, batch, answers))
    for row, prompt in enumerate(PROMPTS):
        for column, answer in enumerate(answers):
            whole = processor(None, [prompt], answers=[answer])
            with hf.torch.no_grad():
                logits = family.network(**given(family, whole)).logits
            picked = hf.torch.log_softmax(logits[0], -1).numpy()
            at = np.flatnonzero(whole.tokens.kind[0] == mj.tokens.CODE["answer"])
            ids = processor.answer_ids(answer, end=False)
            want = sum(picked[p - 1, i] for p, i in zip(at[: len(ids)], ids, strict=True))
            ended = want + picked[at[-1] - 1, whole.ids[0, at[-1]]]
            assert min(abs(got[row, column] - n) for n in (want, ended)) < 1e-4


def test_sweep(loaded):
    model, processor = loaded
    batch = processor(None, PROMPTS)
    edits = [mj.ablate(S.lm.mlp.act[layer, [3]]) for layer in range(3)]
    edits += [mj.ablate(S.lm.mlp.act[2, [n]]) for n in (1, 7)]
    metric = lambda out: out.logits[:, :4]  # noqa: E731
    got = mj.sweep(metric, model, batch, mj.stack(edits))
    for lane, edit in zip(np.asarray(got), edits, strict=True):
        np.testing.assert_allclose(lane, mj.run(model, batch, edit).logits[:, :4], atol=1e-5)


def test_save_hf(family, loaded, tmp_path):
    model, processor = loaded
    saved = mj.save_hf(model, processor, tmp_path / "saved")
    back, report = type(family.network).from_pretrained(
        saved, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = processor(None, PROMPTS)
    with hf.torch.no_grad():
        before, after = (
            network(**given(family, batch)).logits for network in (family.network, back)
        )
    np.testing.assert_array_equal(before[batch.valid], after[batch.valid])
    again, same = mj.load(saved, dtype=jnp.float32)
    assert again.config == model.config
    np.testing.assert_array_equal(same(None, PROMPTS).ids, batch.ids)


def test_the_chat_template_is_theirs(family, loaded):
    chat = [
        {"role": "system", "content": "answer yes or no"},
        {"role": "user", "content": "is it a cat ?"},
    ]
    want = family.processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    batch = loaded[1](None, [chat])
    np.testing.assert_array_equal(batch.ids[batch.valid], want)
    asked = batch.ids[batch.tokens.kind == mj.tokens.CODE["question"]]
    assert loaded[1].tokenizer.convert_ids_to_tokens(asked) == ["is", "it", "a", "cat", "?"]


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p([tiny.picture(0)], ["what is it ?"]),
        lambda p: p([[], [tiny.picture(0)]], ["what ?", "what is it ?"]),
        lambda p: p(None, ["what ?"], features=np.zeros((1, 4, 8), np.float32)),
        lambda p: p(None, [[{"role": "user", "content": [
            {"type": "image", "image": tiny.picture(0)}, {"type": "text", "text": "what ?"}]}]]),
    ],
)  # fmt: skip
def test_a_picture_is_refused(call, loaded):
    with pytest.raises(ValueError, match="this model reads only text: give images=None"):
        call(loaded[1])


def test_a_picture_without_pixels_is_refused(loaded):
    with pytest.raises(ValueError, match="has 1 <image> for 0 pictures"):
        loaded[1](None, ["<image> what ?"])


@pytest.mark.parametrize("pictures", [None, [], [[], []], [None, None]])
def test_no_pictures_in_any_form(pictures, loaded):
    batch = loaded[1](pictures, ["what ?", "yes"])
    assert not len(batch.is_real_tile) and batch.pixels.shape[0] == 0


def test_it_has_no_projector(family):
    for projector in ("random", family.directory / "model.safetensors"):
        with pytest.raises(ValueError, match="this model has no projector"):
            mj.load(family.directory, projector=projector)


@pytest.mark.parametrize("site", [S.vision.mlp.act, S.projector.out])
def test_sites_of_pictures_are_refused(site, loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match=f"no site {site.name}"):
        mj.run(model, processor(None, PROMPTS), mj.ablate(site))


@pytest.mark.slow
def test_a_plan(family):
    found = plan.plan(family.config, topology="v5e:1x1", study="counts")
    assert found
