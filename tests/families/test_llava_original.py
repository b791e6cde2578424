"""The layout of the original LLaVA code, by round trip from a model of transformers."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import mllm_jax as mj
from mllm_jax import families
from mllm_jax.checkpoints import torch_file
from mllm_jax.families.llava import keys as llava_keys
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava import original
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.loading import load, save
from mllm_jax.models.projector import Projector
from tests.helpers import spellings, tiny


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def expected(hf_directory):
    return load.read_model(hf_directory, dtype=jnp.float32)


@pytest.fixture(scope="module")
def root(torch, hf_model, hf_directory, tmp_path_factory):
    """That model in the original layout, with files of torch itself."""
    tensors = {llava_keys.canonical_key(key): t for key, t in hf_model.state_dict().items()}
    fields = json.loads((hf_directory / "config.json").read_text())
    directory = tmp_path_factory.mktemp("original") / "llava"
    spellings.write_original(tensors, fields, directory, torch.save)
    return directory


@pytest.fixture
def copy(root, tmp_path):
    """A function that makes a copy with other fields in the model's config."""

    def make(**fields):
        for path in root.rglob("*"):
            if path.is_file():
                new = tmp_path / path.relative_to(root)
                new.parent.mkdir(exist_ok=True)
                new.write_bytes(path.read_bytes())
        changed = json.loads((root / "model" / "config.json").read_text()) | fields
        (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
        return tmp_path / "model"

    return make


def leaves(model):
    return {load.dotted(p): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(model))}


def assert_equal(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_whole_model_with_its_tower_elsewhere(root, expected):
    model = load.read_model(root / "model", dtype=jnp.float32)
    assert_equal(model, expected)
    assert model.config.image_token == 96  # the first id after the vocabulary
    assert model.config.vision == expected.config.vision
    assert model.config.lm == expected.config.lm
    assert model.config.projector == expected.config.projector


def test_tower_within_the_checkpoint(copy, expected, hf_model):
    directory = copy(mm_vision_tower="../clip")  # as seen from the checkpoint
    (directory.parent / "clip" / "pytorch_model.bin").unlink()
    (directory / "pytorch_model.bin.index.json").unlink()
    tensors = {llava_keys.canonical_key(key): t.numpy() for key, t in hf_model.state_dict().items()}
    tensors = {key: np.ascontiguousarray(t) for key, t in tensors.items()}
    safetensors.numpy.save_file(
        spellings.spell(tensors, "original"), directory / "model.safetensors"
    )
    assert_equal(load.read_model(directory, dtype=jnp.float32), expected)


def test_towers_as_transformers_saves_them(root, copy, expected, hf_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = hf_model.config.vision_config
    text = transformers.CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    both = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    )
    alone = transformers.CLIPVisionModel(vision)
    theirs = hf_model.model.vision_tower.state_dict()
    both.vision_model.load_state_dict(theirs)
    alone.load_state_dict(theirs)
    for name, tower in {"both": both, "alone": alone}.items():
        tower.save_pretrained(tmp_path / name)
        directory = copy(mm_vision_tower=str(tmp_path / name))
        assert_equal(load.read_model(directory, dtype=jnp.float32), expected)


def test_a_projector_from_pretraining(root, copy, expected):
    pretrain = root / "pretrain"
    assert sorted(path.name for path in pretrain.iterdir()) == ["config.json", "mm_projector.bin"]
    assert_equal(load.read_model(pretrain, dtype=jnp.float32), expected)
    other = copy()
    model = load.read_model(other, projector="random", dtype=jnp.float32)
    assert not np.array_equal(model.projector.linears[0].kernel[...], 0)
    for projector in (pretrain / "mm_projector.bin", pretrain, str(pretrain)):
        assert_equal(load.read_model(other, projector=projector, dtype=jnp.float32), expected)


def test_projector_file_both_ways(torch, expected, root, tmp_path):
    path = tmp_path / "new" / "mm_projector.bin"
    mj.write_projector(expected, path, dtype=np.float32)
    ours, theirs = (
        torch.load(p, weights_only=True) for p in (path, root / "pretrain" / "mm_projector.bin")
    )
    assert sorted(ours) == sorted(theirs) == [
        f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("bias", "weight")
    ]  # fmt: skip
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    blank = jax.tree.map(jnp.zeros_like, expected)
    merged = mj.read_projector(blank, path)
    assert_equal(merged.projector, expected.projector)
    assert_equal(merged.lm, blank.lm)
    assert merged.lm.embed[...] is blank.lm.embed[...]  # shared, not copied
    assert not blank.projector.linears[0].kernel[...].any()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    mj.write_projector(half, path, dtype=jnp.bfloat16)
    assert torch.load(path, weights_only=True)["model.mm_projector.0.bias"].dtype == torch.bfloat16
    assert_equal(mj.read_projector(half, path), half)


def test_a_linear_projector(tmp_path, random_model):
    config = llava.LlavaConfig.tiny()
    for depth, keys in ((1, {"model.mm_projector.weight", "model.mm_projector.bias"}), (3, None)):
        projector = llava.ProjectorConfig(in_width=32, out_width=32, depth=depth)
        model = random_model(
            llava.LlavaConfig(vision=config.vision, lm=config.lm, projector=projector)
        )
        mj.write_projector(model, tmp_path / "mm_projector.bin", dtype=np.float32)
        found = set(torch_file.read(tmp_path / "mm_projector.bin"))
        assert found == (keys or {f"model.mm_projector.{n}.{k}" for n in (0, 2, 4) for k in
                                  ("weight", "bias")})  # fmt: skip
        blank = jax.tree.map(jnp.zeros_like, model)
        merged = mj.read_projector(blank, tmp_path / "mm_projector.bin")
        assert_equal(merged.projector, model.projector)


def test_wrong_projectors(expected, tmp_path, root):
    with pytest.raises(ValueError, match=r"p.npz: a projector is written as .safetensors or .bin"):
        mj.write_projector(expected, tmp_path / "p.npz")
    with pytest.raises(FileNotFoundError, match=r"none.bin: missing"):
        mj.read_projector(expected, tmp_path / "none.bin")
    with pytest.raises(ValueError, match=r"4 missing: multi_modal_projector.linear_1.*left over"):
        mj.read_projector(expected, root / "clip" / "pytorch_model.bin")
    wide = llava.ProjectorConfig(in_width=64, out_width=24)
    rng = nnx.Rngs(0)
    other = nnx.clone(expected)
    other.projector = Projector(wide, rngs=rng)
    mj.write_projector(other, tmp_path / "wide.bin")
    with pytest.raises(ValueError, match=r"wide.bin: .*linear_1.weight is \[24, 64\], expected"):
        load.read_model(root / "model", projector=tmp_path / "wide.bin")
    with pytest.raises(FileNotFoundError, match=r"none.bin: missing"):
        load.read_model(root / "model", projector=tmp_path / "none.bin")


def test_all_that_is_not_supported_in_one_line(copy):
    three = {"mm_projector_type": "resampler", "mm_hidden_size": 7, "image_aspect_ratio": "anyres"}
    with pytest.raises(ValueError) as error:
        load.read_config(copy(**three))
    message = str(error.value)
    for part in (
        "model/config.json: ",
        "mm_projector_type='resampler' is not supported",
        "mm_hidden_size=7, but ",
        "image_aspect_ratio='anyres' is not supported, only 'pad'",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(ValueError) as error:
        load.read_config(copy(mm_vision_select_feature="cls", mm_use_im_start_end=True))
    assert "mm_vision_select_feature='cls' is not supported" in str(error.value)
    assert "mm_use_im_start_end=True is not supported, only False" in str(error.value)
    with pytest.raises(ValueError, match="; and [1-9] more$") as error:
        load.read_config(copy(**three, mm_vision_select_feature="cls", mm_use_im_start_end=True))
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="unknown field text_config.mm_gizmo"):
        load.read_config(copy(mm_gizmo=1))
    with pytest.raises(ValueError, match="text_config.model_type='mpt' is not supported"):
        load.read_config(copy(model_type="mpt"))


def test_no_tower(copy, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        load.read_model(copy(mm_vision_tower="somebody/no-such-tower"))
    assert "config.json: mm_vision_tower: 'somebody/no-such-tower' is not a directory" in str(
        error.value
    )
    assert str(error.value).endswith("it may be a local directory")


def test_pictures_and_prompts(root, copy):
    """No file of the original layout says what `<image>` is, or how a picture is prepared."""
    directory = copy(mm_vision_tower="../clip")
    tiny.tokenizer(llava.LlavaConfig.tiny()).save_pretrained(directory)
    saved = json.loads((directory / "tokenizer.json").read_text())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] != "<image>"]
    del saved["model"]["vocab"]["<image>"]
    (directory / "tokenizer.json").write_text(json.dumps(saved))
    settings = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    (directory.parent / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    model, processor = mj.load(directory)
    assert processor.image_aspect_ratio == "pad"
    assert mj.load(directory, image_aspect_ratio="square")[1].image_aspect_ratio == "square"
    wide = tiny.picture(0, 24, 48)
    batch = processor([wide], ["<image> what is shown ?"])
    assert (batch.tokens.kind == mj.tokens.CODE["image"]).sum() == model.config.image_tokens == 16
    bars = batch.pixels[0, [0, -1]]  # of the mean colour: zero once normalised
    np.testing.assert_allclose(bars, 0, atol=0.02)
    assert np.abs(batch.pixels).max() > 1


def test_llava_next_in_the_original_layout(tmp_path, random_model):
    """Its tower is within the checkpoint, in safetensors, as `liuhaotian/llava-v1.6-...` has it."""
    config = llava_next.LlavaNextConfig.tiny()
    model = random_model(config)
    saved = save.save_hf(model, None, tmp_path / "hf")
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    fields = json.loads((saved / "config.json").read_text())
    directory = spellings.write_original(tensors, fields, tmp_path / "new", torch_file.write)
    (directory / "pytorch_model.bin.index.json").unlink()
    safetensors.numpy.save_file(
        spellings.spell(tensors, "original"), directory / "model.safetensors"
    )
    mine = json.loads((directory / "config.json").read_text()) | {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [list(size) for size in config.pinpoints],
        "mm_patch_merge_type": "spatial_unpad",
    }
    (directory / "config.json").write_text(json.dumps(mine))
    again = load.read_model(directory, dtype=jnp.float32)
    assert_equal(again, model)
    assert isinstance(again, llava_next.LlavaNext)
    assert again.config.pinpoints == config.pinpoints
    settings = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    (tmp_path / "new" / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    made = original.image_processor(tmp_path / "new" / "clip", config)
    pixels = made([tiny.picture(0, 48)], return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 5, 3, 24, 24)


def test_fields_of_the_released_model():
    """`liuhaotian/llava-v1.5-7b` is the released LLaVA-1.5, with a vocabulary not padded."""
    fields = {
        "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False, "hidden_act": "silu", "hidden_size": 4096,
        "image_aspect_ratio": "pad", "initializer_range": 0.02, "intermediate_size": 11008,
        "max_length": 4096, "max_position_embeddings": 4096, "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True,
        "vocab_size": 32000,
    }  # fmt: skip
    tower = {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    found = families.from_hf(original.to_hf(fields, {"vision_config": tower}, "config.json"))
    released = llava.LlavaConfig.llava_1_5_7b()
    assert found.vision == released.vision and found.projector == released.projector
    assert found.lm == llava.DecoderConfig(vocab=32000)
    assert found.image_token == released.image_token
    for kind, depth in (("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3), (None, 1)):
        other = {k: v for k, v in fields.items() if k != "mm_projector_type"}
        other |= {"mm_projector_type": kind} if kind else {}
        assert original.to_hf(other, tower, "config.json")["projector_depth"] == depth


def test_save_hf_of_an_original(root, expected, tmp_path):
    model = load.read_model(root / "model", dtype=jnp.float32)
    source = types.SimpleNamespace(directory=root / "model")
    saved = save.save_hf(model, source, tmp_path / "saved")
    assert_equal(load.read_model(saved, dtype=jnp.float32), expected)
    assert json.loads((saved / "config.json").read_text())["text_config"]["eos_token_id"] == 7
