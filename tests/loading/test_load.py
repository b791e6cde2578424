from __future__ import annotations

import gc
import json
import os
import pathlib
import pickle
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from benchmarks import load_memory
from mllm_jax.checkpoints import torch_file
from mllm_jax.families.llava import keys as llava_keys
from mllm_jax.families.llava import model as llava
from mllm_jax.loading import load, save
from tests.helpers import spellings


@pytest.fixture(scope="module")
def directory(tiny_model, tmp_path_factory):
    """The tiny model as a checkpoint; its vision tower ends at the layer that is read."""
    return save.save_hf(tiny_model, None, tmp_path_factory.mktemp("load") / "tiny")


@pytest.fixture
def editable(directory, tmp_path):
    """The same with its tensors in hand, and a function that writes them somewhere else."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")

    def write(tensors, **fields):
        config = json.loads((directory / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return tensors, write


def leaves(model):
    return {load.dotted(p): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(model))}


def assert_equal(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_same_model_comes_back(tiny_model, directory):
    model = load.read_model(directory, dtype=jnp.float32)
    assert_equal(model, tiny_model)
    # JAX transforms take it as an argument: it is a whole module, not a shell of one.
    assert jax.jit(lambda m: m.lm.embed[...].sum())(model) == pytest.approx(
        float(tiny_model.lm.embed[...].sum()), rel=1e-4
    )


@pytest.mark.parametrize("spelling", spellings.SPELLINGS)
def test_every_spelling_is_the_same_model(tiny_model, editable, spelling):
    tensors, write = editable
    renamed = spellings.spell(tensors, spelling)
    assert (renamed.keys() == tensors.keys()) == (spelling == "hub")
    assert_equal(load.read_model(write(renamed), dtype=jnp.float32), tiny_model)


def test_spellings_are_those_of_transformers(hf_model, hf_directory, tmp_path):
    """On disk and in memory, as the installed transformers has them."""
    disk = safetensors.numpy.load_file(hf_directory / "model.safetensors")
    memory = {key: t.numpy().copy() for key, t in hf_model.state_dict().items()}
    hub = {llava_keys.canonical_key(key): t for key, t in disk.items()}
    assert spellings.spell(hub, "transformers-5-disk").keys() == disk.keys()
    assert spellings.spell(hub, "transformers-5-memory").keys() == memory.keys()
    (tmp_path / "config.json").write_bytes((hf_directory / "config.json").read_bytes())
    safetensors.numpy.save_file(memory, tmp_path / "model.safetensors")
    models = [load.read_model(place, dtype=jnp.float32) for place in (hf_directory, tmp_path)]
    assert_equal(*models)


def save_shards(shards: list[dict], directory: pathlib.Path, suffix: str = "safetensors"):
    """Tensors in several files, with their index; returns the paths."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    write = {"safetensors": safetensors.numpy.save_file, "bin": torch_file.write}[suffix]
    names = [f"{stem}-{n + 1:05d}-of-{len(shards):05d}.{suffix}" for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write(shard, directory / name)
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = directory / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [directory / name for name in names]


@pytest.fixture
def sharded(editable, tmp_path):
    """A function that writes the tensors in three shards, after a change of theirs."""
    tensors, write = editable

    def make(change=lambda shards: None, suffix: str = "safetensors"):
        (write(tensors) / "model.safetensors").unlink()
        shards = [{key: tensors[key] for key in sorted(tensors)[n::3]} for n in range(3)]
        change(shards)
        return tmp_path, save_shards(shards, tmp_path, suffix)

    return make


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tiny_model, sharded, suffix):
    directory, shards = sharded(suffix=suffix)
    assert_equal(load.read_model(directory, dtype=jnp.float32), tiny_model)
    index = next(directory.glob("*.index.json"))
    shards[2].unlink()
    with pytest.raises(FileNotFoundError) as error:
        load.read_model(directory)
    assert str(error.value) == f"{shards[2]}: missing; fetch it again"  # and nothing besides
    for broken, reason in {
        "{": r"not readable as JSON \(",
        "[]": "holds list instead of a JSON object",
        '{"weight_map": 3}': "not a readable index, it has no weight_map",
        '{"weight_map": {"a": 3}}': "not a readable index, a is in 3, expected a file beside it",
        '{"weight_map": {"a": "../b"}}': "not a readable index, a is in '../b', expected a file beside it",
    }.items():
        index.write_text(broken)
        with pytest.raises(ValueError, match=f"{index.name}: {reason}"):
            load.read_model(directory)


def test_one_file_of_pytorch(tiny_model, editable):
    tensors, write = editable
    directory = write(tensors)
    torch_file.write(tensors, directory / "pytorch_model.bin")
    (directory / "model.safetensors").rename(directory / "aside")
    assert_equal(load.read_model(directory, dtype=jnp.float32), tiny_model)
    (directory / "aside").rename(directory / "model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"")  # safetensors are preferred
    assert_equal(load.read_model(directory, dtype=jnp.float32), tiny_model)


def test_all_that_is_wrong_with_the_shards_in_one_line(sharded, tmp_path):
    integers = "language_model.model.norm.weight"
    shape = "multi_modal_projector.linear_1.bias"
    gone = "language_model.model.layers.1.mlp.up_proj.weight"
    twice = "language_model.lm_head.weight"

    def spoil(shards):
        for shard in shards:
            shard.pop(gone, None)
            for key in {integers, shape} & shard.keys():
                shard[key] = shard[key].astype(np.int8) if key == integers else shard[key][:5]
        at = next(n for n, shard in enumerate(shards) if twice in shard)
        shards[at - 1]["lm_head.weight"] = shards[at][twice]
        shards[0]["gizmo"] = np.zeros(2, np.float32)
        down = [key for shard in shards for key in shard if key.endswith("mlp.down_proj.weight")]
        for key in down[:2]:  # a shard of its own for each
            shards.append({key: next(s for s in shards if key in s).pop(key)})

    directory, paths = sharded(spoil)
    paths[3].write_bytes(paths[3].read_bytes()[:-3])
    paths[4].unlink()
    index = directory / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] | {"vision_tower.gadget": paths[1].name}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FileNotFoundError) as error:
        load.read_model(directory)
    assert len(str(error.value)) < 400 and str(error.value).endswith(" more")
    message = "; ".join(map(str, error.value.__cause__.exceptions))  # the line holds the first
    assert message.startswith(str(error.value).partition("; ")[0])
    for part in (
        f"{paths[3]}: truncated or altered (",
        f"{paths[4]}: missing; fetch it again",
        f"{index}: names tensors that {paths[1].name} lacks: vision_tower.gadget",
        "are the same tensor",
        f"1 missing: {gone}",
        "left over: ",
        "gizmo",
        "linear_1.bias is [5], expected [32]",
        f"{integers} holds int8, expected floating point",
    ):
        assert part in message, part
    assert "\n" not in message
    assert "down_proj" not in message  # what a broken shard should hold is not missing as well


def test_config_and_tensors_in_one_error(sharded):
    """A field we do not know does not hide what is wrong with the tensors."""
    directory, _ = sharded(lambda shards: shards[0].update(gizmo=np.zeros(2, np.float32)))
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"gadgets": 3}))
    with pytest.raises(ValueError) as error:
        load.read_model(directory)
    message = str(error.value)
    assert message.startswith(f"{path}: unknown field gadgets") and "left over: gizmo" in message
    assert "missing" not in message and "\n" not in message


def test_a_tensor_twice(sharded, editable):
    """In two shards, or in two spellings."""
    tensors, write = editable
    key = "language_model.lm_head.weight"

    def both(spelled):
        def change(shards):
            for shard in shards:
                shard.setdefault(spelled, tensors[key])

        return change

    directory, paths = sharded(both(key))
    with pytest.raises(ValueError, match=rf"'{key}' and '{key}' of {paths[0].name} are the same"):
        load.read_model(directory)
    two = {"lm_head.weight": tensors[key]}
    with pytest.raises(ValueError, match=r"'lm_head.weight'.* are the same tensor"):
        load.read_model(write(tensors | two))


def test_hostile_weights_are_refused(editable, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    tensors, write = editable
    directory = write(tensors)
    (directory / "model.safetensors").unlink()
    with zipfile.ZipFile(directory / "pytorch_model.bin", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"weight": Trap()}, 2))
    with pytest.raises(ValueError) as error:
        load.read_model(directory)
    refused = f"{directory / 'pytorch_model.bin'}: refused, it calls {os.mkdir.__module__}.mkdir"
    assert str(error.value).startswith(refused) and "missing" not in str(error.value)
    assert not (tmp_path / "trap").exists()
    for value, message in (
        ([1, 2], "pytorch_model.bin: holds a list, not tensors by name"),
        ({"epoch": 3}, "pytorch_model.bin: not a tensor: epoch"),
    ):
        torch_file.write(value, directory / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            load.read_model(directory)


def test_dtype(directory):
    assert leaves(load.read_model(directory))["lm.embed"].dtype == jnp.float32  # tests run on CPU
    for value in leaves(load.read_model(directory, dtype=jnp.bfloat16)).values():
        assert value.dtype == jnp.bfloat16


def test_projector_from_a_file_or_at_random(tiny_model, editable, tmp_path):
    tensors, write = editable
    bare = {k: v for k, v in tensors.items() if not k.startswith("multi_modal_projector.")}
    directory = write(bare)
    with pytest.raises(ValueError, match=r"4 missing: multi_modal_projector.linear_1.weight"):
        load.read_model(directory)
    file = tmp_path / "projector" / "ours.safetensors"
    save.write_projector(tiny_model, file, dtype=np.float32)
    assert_equal(load.read_model(directory, projector=file), tiny_model)
    save.write_projector(tiny_model, file)  # float16
    half, whole = (leaves(m) for m in (load.read_model(directory, projector=file), tiny_model))
    path = "projector.linears.1.kernel"
    assert half[path].dtype == np.float32
    assert 0 < np.abs(half[path] - whole[path]).max() < 1e-3
    one, same, other = (
        leaves(load.read_model(directory, projector="random", seed=seed))[path]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_peak_memory_is_the_model_and_one_tensor(random_model, tmp_path):
    lm = llava.DecoderConfig(
        vocab=4096, width=256, layers=6, heads=4, kv_heads=4, head_width=64, mlp=1024
    )
    config = llava.LlavaConfig.of(llava.ClipConfig.tiny(), lm, fold=2, image_token=4095)
    model = random_model(config)
    directory = save.save_hf(model, None, tmp_path / "model")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(model))
    load.read_model(directory)  # so that tracing is not counted
    gc.collect()
    tracemalloc.start()
    held = load.read_model(directory)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del held
    assert peak < size + 1.1 * largest


@pytest.mark.slow
def test_peak_memory_of_a_large_checkpoint_in_shards():
    """Resident memory in all: Python, the model, and one tensor of a mapped file at a time."""
    found = load_memory.run()
    assert found["model"] > load_memory.GIB
    assert found["peak"] - found["model"] < 0.5 * load_memory.BOUND
    assert found["own"] - found["model"] < found["before"] + 0.1 * load_memory.BOUND


def test_bad_checkpoints(editable, tmp_path):
    tensors, write = editable
    directory = write({**tensors, "language_model.model.layers.0.extra": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"1 left over: language_model.model.layers.0.extra"):
        load.read_model(directory)
    with pytest.raises(ValueError, match=r"unknown field projector_fild .nearest: projector_fold"):
        load.read_model(write(tensors, projector_fild=2))
    directory = write(tensors)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    for bad in (whole[:-10], whole[:100], b"", b"\xff" * 200):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match=r"model.safetensors: truncated or altered"):
            load.read_model(directory)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor pytorch_model"):
        load.read_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not readable as JSON"):
        load.read_model(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json: missing"):
        load.read_model(directory)


def test_a_head_that_is_not_the_embedding_is_read(editable):
    """Whatever `tie_word_embeddings` says, as in transformers."""
    tensors, write = editable
    embedding = tensors["language_model.model.embed_tokens.weight"]
    head = "language_model.lm_head.weight"
    model = load.read_model(write(tensors | {head: embedding}, tie_word_embeddings=True))
    assert not hasattr(model.lm, "head")
    model = load.read_model(write(tensors, tie_word_embeddings=True), dtype=jnp.float32)
    assert not model.config.lm.tied
    np.testing.assert_array_equal(model.lm.head.kernel[...], np.asarray(tensors[head]).T)


@pytest.mark.parametrize("have", ["safetensors", "bin"])
def test_from_the_hub(monkeypatch, tmp_path, have):
    """Pickles are fetched only where there are no safetensors, and nothing but settings to look."""
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        if f"*.{have}" in allow_patterns or "pytorch_model*.bin" in allow_patterns:
            (tmp_path / f"model.{have}").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load.locate("somebody/model", weights=False) == tmp_path
    assert load.locate("somebody/model") == tmp_path
    settings, first, *second = asked
    assert settings == ["*.json", "*.jinja", "*.model"] and "*.safetensors" in first
    assert ["mm_projector.bin" in patterns for patterns in second] == [True] * (have == "bin")
    assert not any(pattern.endswith(".bin") for pattern in first)


def test_names(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load.locate(tmp_path) == tmp_path
    for name in ("somebody/no-such-model", "./no/such/directory", "two words"):
        with pytest.raises(
            FileNotFoundError, match="is not a directory and not available"
        ) as error:
            load.locate(name)
        assert "\n" not in str(error.value)
