"""Gemma 3: its config in every form, its keys, and what its processor refuses."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import families
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.llava import keys as spellings
from mllm_jax.loading import sources
from tests.helpers import gemma, hf, hooks, tiny

# config.json of google/gemma-3-4b-it: what equals the defaults of the time is not in it.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
_12B = {
    "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
    "num_hidden_layers": 48, "num_key_value_heads": 8,
}  # fmt: skip
_27B = {
    "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
    "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
}  # fmt: skip


def changed(**parts):
    """The config with fields changed: of the whole, `text_config` or `vision_config`."""
    fields = dict(GEMMA_3_4B)
    for name, value in parts.items():
        fields[name] = fields[name] | value if isinstance(fields.get(name), dict) else value
    return fields


@pytest.mark.parametrize(
    ("fields", "name", "parameters"),
    [
        (GEMMA_3_4B, "gemma-3-4b", 4_300_079_472),
        (changed(text_config=_12B), "gemma-3-12b", 12_187_325_040),
        (changed(text_config=_27B), "gemma-3-27b", 27_432_406_640),
    ],
)
def test_released_configs(fields, name, parameters):
    """The number of parameters is that which the hub shows."""
    config = families.from_hf(fields)
    assert config == families.RELEASED[name]()
    assert families.from_hf(families.of(config).to_hf(config)) == config
    assert hf.count(config) == parameters


def test_the_layers_of_4b():
    lm = families.RELEASED["gemma-3-4b"]().lm
    assert lm.windows[:7] == (1024,) * 5 + (0, 1024) and lm.windows[-4:] == (1024,) * 4
    assert (lm.rope_theta, lm.local_rope_theta) == (1e6, 1e4)
    assert lm.rope_scaling.factor == 8.0 and lm.tied and lm.query_scale is None


@pytest.mark.parametrize("vision", [{}, {"image_size": 448, "patch_size": 14}])
def test_defaults_are_those_of_transformers(vision):
    tower = {"model_type": "siglip_vision_model", "image_size": 256} | vision
    theirs = hf.transformers.Gemma3Config(
        vision_config=hf.transformers.SiglipVisionConfig(**tower),
        text_config=hf.transformers.Gemma3TextConfig(),
    )
    empty = {"model_type": "gemma3", "vision_config": tower}
    assert families.from_hf(theirs.to_dict()) == families.from_hf(empty)


@pytest.mark.parametrize(
    "change",
    [
        {"text_config": {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }, "rope_scaling": None}},
        {"text_config": {"rope_theta": 1e6, "rope_local_base_freq": 1e4}},
        {"text_config": {"sliding_window_pattern": 6, "cache_implementation": "hybrid"}},
        {"text_config": {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5
                         + ["sliding_attention"] * 4}},
        {"tie_word_embeddings": True},
        {"text_config": {"tie_word_embeddings": False}},  # the root's decides
        {"text_config": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}},
        {"image_token_id": 262144, "boi_token_id": 255999, "eoi_token_id": 256000},
    ],
)  # fmt: skip
def test_spellings_of_the_same_model(change):
    assert families.from_hf(changed(**change)) == families.RELEASED["gemma-3-4b"]()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (changed(mm_tokens_per_image=100), "mm_tokens_per_image=100 is not the number of equal"),
        (changed(mm_tokens_per_image=255), "mm_tokens_per_image=255 is not the number of equal"),
        (changed(text_config={"model_type": "gemma2"}), "text_config.model_type='gemma2'"),
        (changed(text_config={"use_bidirectional_attention": True}), "use_bidirectional_attention"),
        (changed(text_config={"num_experts": 8}), "unknown field text_config.num_experts"),
        (changed(vision_config={"model_type": "clip_vision_model"}), "'clip_vision_model'"),
        (changed(audio_config={}), "unknown field audio_config"),
        (changed(quantization_config={"quant_method": "int4"}), "quantised by 'int4'"),
    ],
)
def test_refused_by_name(fields, words):
    with pytest.raises(ValueError) as error:
        families.from_hf(fields, "here/config.json")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return gemma.checkpoint(tmp_path_factory.mktemp("gemma3"))


def test_keys_of_the_hub_and_of_memory(checkpoint, tmp_path):
    """Both spellings are the same tensors; a head in the file that is not the embedding is used."""
    hub = sources.tensors_.open_directory(checkpoint.directory, [], spellings.canonical_key)
    own = {spellings.canonical_key(key) for key in checkpoint.network.state_dict()}
    assert own - set(hub) == {"language_model.lm_head.weight"}
    files = [path.name for path in checkpoint.directory.iterdir()]
    for name in files:
        shutil.copyfile(checkpoint.directory / name, tmp_path / name)
    tensors = {k: v.contiguous().clone() for k, v in checkpoint.network.state_dict().items()}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    model, _ = mj.load(tmp_path, dtype=jnp.float32)
    same, _ = mj.load(checkpoint.directory, dtype=jnp.float32)
    np.testing.assert_array_equal(model.lm.embed[...], same.lm.embed[...])
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    head = mj.load(tmp_path, dtype=jnp.float32)[0].lm.head.kernel[...]
    np.testing.assert_array_equal(head, tensors["lm_head.weight"].numpy().T)


def test_pan_and_scan_is_refused(checkpoint, tmp_path):
    for path in checkpoint.directory.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    name = tmp_path / "processor_config.json"
    fields = json.loads(name.read_text())
    fields["image_processor"]["do_pan_and_scan"] = True
    name.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="do_pan_and_scan=True is not supported") as error:
        mj.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_picture_is_a_block_and_text_is_none(checkpoint):
    """Its tokens stand between those of its begin and its end, on lines of their own."""
    processor = mj.load(checkpoint.directory)[1]
    batch = processor(
        [[tiny.picture(0, 30, 40)] * 2, []], ["<image> what\n<image>\nis it", "yes no"]
    )
    ids = processor.tokenizer.convert_ids_to_tokens(batch.ids[0][batch.valid[0]])
    two, three = "\n\n", "\n\n\n"
    picture = ["<start_of_image>", *["<image_soft_token>"] * 4, "<end_of_image>"]
    assert ids == ["<s>", two, *picture, two, "what", three, *picture, three, "is", "it"]
    blocks = [list(batch.block[0][batch.valid[0]]).count(n) for n in (1, 2)]
    assert blocks == [4, 4] and not batch.block[1].any()
    np.testing.assert_array_equal(batch.tokens.row[0][batch.block[0] == 1], [0, 0, 1, 1])
    assert processor(None, ["what is it"]).block is None


def test_pixels_of_odd_sizes_are_theirs(checkpoint):
    """Squares, whatever the shape; also at a size at which bilinear resizing averages."""
    processor = mj.load(checkpoint.directory)[1]
    for number in range(30):
        height, width = number * 97 % 301 + 1, number * 331 % 409 + 1
        picture = tiny.picture(number, height, width)
        want = checkpoint.processor(
            images=[picture], text="<start_of_image> is it", return_tensors="np"
        )
        batch = processor([picture], ["<image> is it"])
        np.testing.assert_array_equal(batch.ids[batch.valid], want["input_ids"][0])
        np.testing.assert_array_equal(batch.pixels, want["pixel_values"].transpose(0, 2, 3, 1))


def test_an_answer_ends_with_the_end_of_its_turn(checkpoint, tmp_path):
    processor = mj.load(checkpoint.directory)[1]
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end not in processor.stop_ids
    assert processor.answer_ids("yes")[-1] == processor.tokenizer.eos_token_id
    for path in checkpoint.directory.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    stops = {"eos_token_id": [processor.tokenizer.eos_token_id, end]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stops))
    processor = mj.load(tmp_path)[1]
    assert list(processor.stop_ids) == [end, processor.tokenizer.eos_token_id]
    assert processor.answer_ids("yes")[-1] == end


@pytest.mark.slow
def test_a_knockout_between_the_tokens_of_a_picture(checkpoint):
    """Also of later tokens, which only the tokens of the picture see."""
    model, processor = mj.load(checkpoint.directory, dtype=jnp.float32)
    pictures = [[tiny.picture(0, 30, 40)] * 2]
    batch = processor(pictures, ["<image> what <image> is it"], left=True)
    image = batch.tokens.kind == tok.CODE["image"]
    edit = mj.knockout(S.lm.attn[:2], to=tok.image, on=tok.image)
    given = {k: hf.torch.from_numpy(v) for k, v in checkpoint.inputs(batch, pictures).items()}
    hidden = image[:, :, None] & image[:, None]
    heads = range(model.config.lm.heads)
    handles = [hooks.hide(checkpoint, layer, heads, hidden) for layer in range(2)]
    with hf.torch.no_grad():
        with hooks.removed(handles):
            want = checkpoint.network(**given).logits.numpy()
        clean = checkpoint.network(**given).logits.numpy()
    got = np.asarray(mj.run(model, batch, edit, logits="all").logits)
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-4)
    assert np.abs(want - clean)[batch.valid].max() > 1e-2
