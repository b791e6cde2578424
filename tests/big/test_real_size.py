"""Models of real size: what their programs need, without their weights; the benchmark on a tiny one."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

import mllm_jax as mj
from benchmarks import real_size
from mllm_jax.interventions import binding
from mllm_jax.passes import generate, run
from tests.helpers import make_checkpoint, tiny

GIB = 2**30
LLAMA = {"7b": 6_738_415_616, "13b": 13_015_864_320}  # parameters, with 32,000 words


def one_picture(config):
    noise = [tiny.picture(0, config.vision.image_size)]
    return tiny.processor(config)([noise], ["what is shown in the picture ?"]).replace(
        processor=None
    )


@pytest.mark.parametrize("size", LLAMA)
def test_shapes(size):
    """Of counts, lens and logits, traced without a number."""
    config = make_checkpoint.SIZES[size]
    model, batch = make_checkpoint.abstract(config), one_picture(config)
    lm = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.lm))
    assert lm == LLAMA[size] + 2 * 64 * config.lm.width
    asked = real_size.COUNTS | real_size.LENS
    out = jax.eval_shape(lambda model: mj.run(model, batch, None, asked), model)
    (L, F, V), (B, T) = (config.lm.layers, config.lm.mlp, config.lm.vocab), batch.ids.shape
    assert out.logits.shape == (B, V) and out.logits.dtype == np.float32
    assert out["LM"].positive.shape == (L, F)
    assert out["vision"].positive.shape == (23, 4096)
    assert out["projector"].positive.shape == (1, config.lm.width)
    assert out["words"].ids.shape == (L, B, T, 10)
    assert out["entropy"].sum.shape[:2] == (L, B)
    made = jax.eval_shape(lambda m: mj.generate(m, batch, max_new_tokens=16).tokens, model)
    assert made.shape == (B, 16)


def programs(model, batch):
    """What `benchmarks.real_size` runs, lowered."""
    for name, asked in (("counts", real_size.COUNTS), ("lens", real_size.LENS)):
        bound = binding.bind(model, batch, None, asked)
        yield name, run.compiled_run.lower(model, batch, *bound, logits="none", remat=False)
    yield (
        "generate",
        generate.compiled_generate.lower(
            model, batch, (), np.full((1,), -1, np.int32), np.float32(1), jax.random.key(0),
            steps=16, greedy=True,
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_memory_of_7b():
    """Arguments, results and all between, as XLA has planned them: no float32 copy of a model."""
    config = make_checkpoint.SIZES["7b"]
    model, batch = make_checkpoint.abstract(config), one_picture(config)
    size = sum(math.prod(leaf.shape) * 2 for leaf in jax.tree.leaves(model))
    for name, program in programs(model, batch):
        planned = program.compile().memory_analysis()
        more = planned.temp_size_in_bytes + planned.output_size_in_bytes
        assert planned.argument_size_in_bytes < size + GIB / 8, name
        assert more < 2.5 * GIB, (name, more / GIB)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = make_checkpoint.cut(make_checkpoint.SIZES["tiny"], 3)
    return config, make_checkpoint.write(tmp_path_factory.mktemp("tiny"), config, shards=3)


def test_the_checkpoint(checkpoint):
    """Is read as it was drawn."""
    config, directory = checkpoint
    assert len(list(directory.glob("model-0000?-of-00003.safetensors"))) == 3
    model, processor = mj.load(directory, dtype=make_checkpoint.BFLOAT16)
    assert model.config == config and config.lm.layers == 3
    key = "language_model.model.layers.2.mlp.up_proj.weight"
    drawn = {tensor.key: tensor for tensor in make_checkpoint.drawn(config)}
    assert np.array_equal(model.lm.layers.mlp.up.kernel[2], np.asarray(drawn[key]).T)
    assert processor([tiny.picture(0)], ["what ?"]).ids.max() == config.image_token


def test_the_checkpoint_is_one_of_transformers(checkpoint):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        checkpoint[1], output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem]


@pytest.mark.slow
def test_benchmark(checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    arguments = [f"--model={checkpoint[1]}", "--steps=4", f"--json={tmp_path / 'found.json'}"]
    found = real_size.main(arguments)
    assert [phase["name"] for phase in found] == ["load", "counts", "lens", "generate"]
    assert all(0 < phase["peak"] <= phase["most"] for phase in found)
    assert found[0]["most"] == found[0]["model"] + GIB
    assert len(found[-1]["result"].split()) == 1 + 4
    assert capsys.readouterr().out.count("kept") == 4
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="ended with 1"):
        real_size.main([f"--model={tmp_path / 'none'}"])
