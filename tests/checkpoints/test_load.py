from __future__ import annotations

import gc
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mllm_jax.checkpoints import load, save
from mllm_jax.models import llava


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


@pytest.mark.parametrize(
    "spell",
    [
        lambda key: key.replace("vision_tower.vision_model.", "vision_tower."),
        lambda key: (
            key.replace("vision_tower.vision_model.", "model.vision_tower.")
            .replace("multi_modal_projector.", "model.multi_modal_projector.")
            .replace("language_model.model.", "model.language_model.")
            .replace("language_model.lm_head.", "lm_head.")
        ),
        lambda key: (
            key.replace("language_model.model.", "model.")
            .replace("language_model.lm_head.", "lm_head.")
            .replace("vision_tower.", "model.vision_tower.vision_tower.")
            .replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
            .replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")
        ),
    ],
    ids=["transformers-5-disk", "transformers-5-memory", "original"],
)
def test_every_spelling_is_the_same_model(tiny_model, editable, spell):
    tensors, write = editable
    renamed = {spell(key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    assert_equal(load.read_model(write(renamed), dtype=jnp.float32), tiny_model)


def test_shards(tiny_model, editable):
    tensors, write = editable
    directory = write(tensors)
    (directory / "model.safetensors").unlink()
    keys, places = sorted(tensors), {}
    for n in range(3):
        shard = f"model-{n + 1:05d}-of-00003.safetensors"
        safetensors.numpy.save_file({k: tensors[k] for k in keys[n::3]}, directory / shard)
        places |= dict.fromkeys(keys[n::3], shard)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_equal(load.read_model(directory, dtype=jnp.float32), tiny_model)
    (directory / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard}: missing"):
        load.read_model(directory)
    index.write_text("{")
    with pytest.raises(ValueError, match="not a readable index"):
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
    lm = llava.LlamaConfig(
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


def test_bad_checkpoints(editable, tmp_path):
    tensors, write = editable
    directory = write({**tensors, "language_model.model.layers.0.extra": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"1 left over: language_model.model.layers.0.extra"):
        load.read_model(directory)
    with pytest.raises(ValueError, match=r"unknown field projector_fild .nearest: projector_fold"):
        load.read_model(write(tensors, projector_fild=2))
    twice = {"lm_head.weight": tensors["language_model.lm_head.weight"]}
    with pytest.raises(ValueError, match=r"'lm_head.weight'.* are the same tensor"):
        load.read_model(write(tensors | twice))

    directory = write(tensors)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    for bad in (whole[:-10], whole[:100], b"", b"\xff" * 200):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match=r"model.safetensors: truncated or altered"):
            load.read_model(directory)
    weights.rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: missing; PyTorch .bin"):
        load.read_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not readable as JSON"):
        load.read_model(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json: missing"):
        load.read_model(directory)


def test_tied_head_must_be_the_embedding(editable):
    tensors, write = editable
    embedding = tensors["language_model.model.embed_tokens.weight"]
    head = "language_model.lm_head.weight"
    model = load.read_model(write(tensors | {head: embedding}, tie_word_embeddings=True))
    assert not hasattr(model.lm, "head")
    with pytest.raises(ValueError, match="a head that is not the embedding"):
        load.read_model(write(tensors, tie_word_embeddings=True))


def test_names(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load.locate(tmp_path) == tmp_path
    for name in ("somebody/no-such-model", "./no/such/directory", "two words"):
        with pytest.raises(FileNotFoundError, match="neither a directory nor to be had") as error:
            load.locate(name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"mesh=...\) is not supported yet"):
        load.load(tmp_path, mesh=jax.make_mesh((1,), ("data",)))
