"""InstructBLIP's checkpoints: what transformers saves we load, and what we save it loads."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import mllm_jax as mj
from mllm_jax import families
from mllm_jax.checkpoints import keys
from mllm_jax.families.instructblip import config as instructblip
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.loading import load, save
from tests.helpers import tiny

TINY = InstructBlipConfig.tiny()

# config.json of Salesforce/instructblip-vicuna-7b, as its conversion script wrote it; what says
# nothing about the network is left out here, but for a few fields of each part.
VICUNA_7B = {
    "architectures": ["InstructBlipForConditionalGeneration"],
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "instructblip",
    "num_query_tokens": 32,
    "qformer_config": {
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": 1408,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "instructblip_qformer",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "vocab_size": 30523,
    },
    "text_config": {
        "architectures": ["LLaMAForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_sequence_length": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "vocab_size": 32001,
    },
    "tie_word_embeddings": False,
    "use_decoder_only_language_model": True,
    "vision_config": {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 224,
        "intermediate_size": 6144,
        "layer_norm_eps": 1e-06,
        "model_type": "instructblip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 39,
        "patch_size": 14,
        "qkv_bias": True,
    },
}


def changed(**parts):
    """VICUNA_7B with fields changed: of the whole, or of one of its parts."""
    fields = dict(VICUNA_7B)
    for name, value in parts.items():
        fields[name] = fields[name] | value if isinstance(fields.get(name), dict) else value
    return fields


def test_the_released_config():
    released = InstructBlipConfig.vicuna_7b()
    assert families.from_hf(changed(image_token_index=32000)) == released
    assert families.from_hf(changed(image_token_id=32000)) == released
    old = families.from_hf(VICUNA_7B)  # prepends its queries, and reserves no id for them
    assert (old.image_token, old.lm, old.qformer) == (-1, released.lm, released.qformer)


@pytest.mark.parametrize("config", [TINY, InstructBlipConfig.vicuna_7b()])
def test_to_hf_and_back(config):
    assert families.from_hf(families.of(config).to_hf(config)) == config


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.InstructBlipConfig(text_config=transformers.LlamaConfig())
    empty = {"model_type": "instructblip", "text_config": {"model_type": "llama"}}
    assert families.from_hf(theirs.to_dict()) == families.from_hf(empty)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (changed(num_query_token=16), "num_query_token (nearest: num_query_tokens)"),
        (changed(use_decoder_only_language_model=False), "use_decoder_only_language_model=False"),
        (changed(text_config={"model_type": "t5"}), "text_config.model_type='t5' is not supported"),
        (
            VICUNA_7B | {"text_config": None},
            "text_config.model_type='opt' is not supported, only 'llama'",
        ),
        (changed(vision_config={"qkv_bias": False}), "vision_config.qkv_bias=False"),
        (changed(vision_config={"image_size": [224, 196]}), "vision_config.image_size=[224, 196]"),
        (changed(qformer_config={"hidden_act": "swiglu"}), "qformer_config.hidden_act='swiglu'"),
        (
            changed(qformer_config={"position_embedding_type": "relative_key"}),
            "qformer_config.position_embedding_type='relative_key'",
        ),
        (
            {"model_type": "blip-2"},
            "model_type='blip-2' is not supported, only llava, llava_next",
        ),
    ],
)
def test_refused_by_name(fields, words):
    with pytest.raises(ValueError) as error:
        families.from_hf(fields, "here/config.json")
    message = str(error.value)
    assert message.startswith("here/config.json: ") and words in message and "\n" not in message


@pytest.mark.parametrize("config", [LlavaConfig.tiny(), TINY, InstructBlipConfig.vicuna_7b()])
def test_every_architecture_has_a_table_of_its_whole_network(config):
    architecture = families.of(config)
    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    params = nnx.to_flat_state(nnx.state(abstract))
    shapes = {load.dotted(path): param.shape for path, param in params}
    slots = keys.slots(shapes, architecture.key_table(config))
    assert {slot.path for slot in slots} == set(shapes)
    places = {(slot.key, slot.part) for slot in slots}
    assert len(places) == len(slots)
    size = sum(np.prod(slot.shape) // slot.part[1] for slot in slots)
    assert size == sum(np.prod(shape) for shape in shapes.values())
    assert type(abstract.config) is architecture.config


def test_several_of_ours_in_one_tensor():
    fused = np.arange(18.0).reshape(6, 3)
    slots = [
        keys.Slot(key="qkv", path=p, layer=None, shape=(6, 3), transform=keys.LINEAR, part=(n, 3))
        for n, p in enumerate("qkv")
    ]  # fmt: skip
    parts = [slot.ours(fused) for slot in slots]
    np.testing.assert_array_equal(parts[1], fused[2:4].T)
    np.testing.assert_array_equal(np.concatenate([p.T for p in parts]), fused)


# There and back.


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.InstructBlipConfig.from_dict(instructblip.to_hf(TINY))
    torch.manual_seed(0)
    network = transformers.InstructBlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    """Network and processor as transformers saves them."""
    from transformers.models import blip, instructblip

    directory = tmp_path_factory.mktemp("theirs")
    images = blip.image_processing_pil_blip.BlipImageProcessorPil(size={"height": 24, "width": 24})
    tokenizer = tiny.tokenizer(TINY, None)
    tokenizer.pad_token = "<unk>"
    processor = instructblip.processing_instructblip.InstructBlipProcessor(
        images, tokenizer, tiny.qformer_tokenizer(), num_query_tokens=TINY.qformer.queries
    )
    theirs.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


PICTURES = [tiny.picture(0, 40), tiny.picture(1)]
PROMPTS = ["what is shown in the picture ?", "which one ?"]


def read(directory, network):
    """What transformers makes of a directory: inputs of its processor, logits, tokens."""
    import torch
    import transformers

    processor = transformers.InstructBlipProcessor.from_pretrained(directory, backend="pil")
    processor.tokenizer.padding_side = "left"
    inputs = processor(images=PICTURES, text=PROMPTS, padding=True, return_tensors="pt")
    inputs["qformer_input_ids"], inputs["qformer_attention_mask"] = (
        processor.qformer_tokenizer(PROMPTS, padding=True, return_tensors="pt")[name]
        for name in ("input_ids", "attention_mask")
    )
    with torch.no_grad():
        tokens = network.generate(
            **inputs, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
        )[:, -8:]
        position = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = network(**inputs, position_ids=position).logits[:, -1]
    return inputs, logits.numpy(), tokens.numpy()


def test_what_transformers_saves_is_loaded_whole(theirs, directory):
    inputs, logits, tokens = read(directory, theirs)
    model, processor = mj.load(directory, dtype=jnp.float32)
    batch = processor(PICTURES, PROMPTS)
    for row in range(2):
        for ours, kind, ids, mask in (
            (batch.ids, batch.tokens.kind, "input_ids", "attention_mask"),
            (batch.qformer_ids, batch.qformer_kind, "qformer_input_ids", "qformer_attention_mask"),
        ):
            want = inputs[ids][row][inputs[mask][row] > 0]
            np.testing.assert_array_equal(ours[row][kind[row] > 0], want)
    pixels = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(batch.pixels, pixels, rtol=0, atol=1e-6)
    np.testing.assert_allclose(mj.run(model, batch).logits, logits, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(mj.generate(model, batch, max_new_tokens=8).tokens, tokens)


def test_what_we_save_transformers_loads_whole(theirs, directory, tmp_path):
    import torch
    import transformers

    model, processor = mj.load(directory, dtype=jnp.float32)
    saved = mj.save_hf(model, processor, tmp_path / "ours")
    back, report = transformers.InstructBlipForConditionalGeneration.from_pretrained(
        saved, output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], value, rtol=0, atol=0, msg=key)
    for ours, want in zip(read(saved, back)[1:], read(directory, theirs)[1:], strict=True):
        np.testing.assert_array_equal(ours, want)
    assert load.read_config(saved) == model.config == TINY


def test_projector_from_a_file_or_at_random(directory, tmp_path):
    model = load.read_model(directory)
    file = tmp_path / "projector.safetensors"
    save.write_projector(model, file, dtype=np.float32)
    assert sorted(safetensors.numpy.load_file(file)) == [
        "language_projection.bias",
        "language_projection.weight",
    ]
    same, other = (load.read_model(directory, projector=p) for p in (file, "random"))
    kernels = [np.asarray(m.projector.linears[0].kernel[...]) for m in (model, same, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    with pytest.raises(ValueError, match=r"no name for language_projection.weight, language_proj"):
        save.write_projector(model, tmp_path / "mm_projector.bin")


def test_missing_layers_are_named_together(directory, tmp_path):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "output_query.dense.bias" not in key}
    safetensors.numpy.save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"4 missing: qformer.encoder.layer.\{0,1,2,3\}.output_q"):
        load.read_model(tmp_path)
