from __future__ import annotations

import errno
import json
import os
import types

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from mllm_jax.families.llava import model as llava
from mllm_jax.loading import load, save
from mllm_jax.models.siglip import SiglipConfig


def test_transformers_reads_what_we_save(hf_model, hf_directory, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source = types.SimpleNamespace(directory=hf_directory)
    model = load.read_model(hf_directory, dtype=jnp.float32)
    saved = save.save_hf(model, source, tmp_path / "saved")
    back, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        saved, output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = hf_model.state_dict()
    for key, value in back.state_dict().items():
        if "post_layernorm" not in key:
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=0, msg=key)
    # The vision layer above the one that is read is gone, and nothing else: the same logits.
    assert set(theirs) - set(back.state_dict()) == {k for k in theirs if "encoder.layers.2." in k}
    ids = torch.tensor([[1, *[95] * 16, 5, 8, 13]])
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (m(input_ids=ids, pixel_values=pixels).logits for m in (hf_model, back))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert back.config.text_config.eos_token_id == 7  # of the source's config, not of ours


def test_bfloat16_and_a_folded_tied_model_come_back(random_model, tmp_path):
    lm = llava.DecoderConfig(
        vocab=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp=24, tied=True
    )
    config = llava.LlavaConfig.of(llava.ClipConfig.tiny(), lm, fold=2, image_token=40)
    model = random_model(config)
    saved = save.save_hf(model, None, tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["projector_fold"] == 2
    back = load.read_model(saved)
    assert back.config.projector == config.projector
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(back)), strict=True
    ):
        np.testing.assert_array_equal(a[...], b[...], err_msg=load.dotted(path))
    half = save.save_hf(load.read_model(saved, dtype=jnp.bfloat16), None, tmp_path / "half")
    assert (half / "model.safetensors").stat().st_size < 0.6 * (
        saved / "model.safetensors"
    ).stat().st_size
    with safetensors.safe_open(half / "model.safetensors", "numpy") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert kinds == {"BF16"}
        assert "language_model.lm_head.weight" not in file.keys()  # noqa: SIM118


def test_tokenizer_files_are_copied(tiny_model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not of the processor")
    processor = types.SimpleNamespace(directory=source)
    saved = save.save_hf(tiny_model, processor, tmp_path / "saved")
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_nothing_is_overwritten_and_nothing_half_written(tiny_model, tmp_path, monkeypatch):
    target = tmp_path / "full"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="full: exists and is not empty"):
        save.save_hf(tiny_model, None, target)

    def disk_full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match=r"cannot write .*model.safetensors: No space left"):
        save.save_hf(tiny_model, None, tmp_path / "new")
    for name in ("p.safetensors", "mm_projector.bin"):
        with pytest.raises(OSError, match=rf"cannot write .*{name}: No space left"):
            save.write_projector(tiny_model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_projector_tensors(tiny_model, tmp_path):
    tensors = save.projector_tensors(tiny_model)
    assert sorted(tensors) == [
        f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("bias", "weight")
    ]
    np.testing.assert_array_equal(
        tensors["multi_modal_projector.linear_1.weight"],
        tiny_model.projector.linears[0].kernel[...].T,
    )
    path = tmp_path / "p.safetensors"
    save.write_projector(tiny_model, path)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.get_tensor("multi_modal_projector.linear_2.bias").dtype == np.float16


def test_a_projector_too_large_for_float16(tiny_model, tmp_path):
    model = nnx.clone(tiny_model)
    model.projector.linears[1].bias[...] = jnp.full_like(model.projector.linears[1].bias, 1e6)
    with pytest.raises(ValueError, match=r"not finite in float16: .*linear_2.bias"):
        save.write_projector(model, tmp_path / "p.safetensors")


def test_a_norm_that_the_layout_has_no_place_for_is_refused(random_model, tmp_path):
    config = llava.LlavaConfig.of(SiglipConfig.tiny(), llava.DecoderConfig.tiny(), image_token=95)
    with pytest.raises(ValueError, match="SigLIP without its last norm"):
        save.save_hf(random_model(config), None, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
