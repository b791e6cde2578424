"""Projector-only training from the command line, on a tiny model and folders of pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

import mllm_jax as mj
from mllm_jax import store

CONFIG = "configs/embedded_projector.py"
SMALL = (
    "--config.train_per_domain=6", "--config.test_per_domain=4", "--config.questions=2",
    "--config.steps=40", "--config.recipe.every=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, execute):
    workdir = tmp_path_factory.mktemp("training") / "work"
    done = execute(command("train", CONFIG, workdir, *SMALL))
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir


@pytest.mark.slow
def test_the_loss_falls_and_the_projector_is_written(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["loss_after"]["right"] < results["loss_before"]["right"]
    assert len((finished / "loss.csv").read_text().splitlines()) == 1 + 40
    written = safetensors.numpy.load_file(finished / "projector.safetensors")
    assert sum(array.size for array in written.values()) == results["trained_parameters"]


@pytest.mark.slow
def test_more_than_the_projector_is_written_as_a_model(checkpoint, command, execute, tmp_path):
    part = ("--config.steps=4", "--config.recipe.part=projector+lora", "--config.projector=")
    done = execute(command("train", CONFIG, tmp_path / "work", *SMALL, *part))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "work/projector.safetensors").exists()
    before, after = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (checkpoint, tmp_path / "work/model")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    kinds = ("multi_modal_projector", "layers", "self_attn", "mlp")
    assert {kind for name in changed for kind in kinds if kind in name} == set(kinds)
    assert not any(part in name for name in changed for part in ("vision", "embed", "norm"))
    results = json.loads((tmp_path / "work/results.json").read_text())
    model, _ = mj.load(tmp_path / "work/model")
    assert store.fingerprint(model) == results["trained_model"]


@pytest.mark.slow
def test_another_config_is_refused(finished, command, execute):
    again = execute(command("train", CONFIG, finished, *SMALL, "--config.recipe.rate=1.0"))
    assert again.returncode == 1
    assert (
        "belongs to another config (it differs in recipe (rate))" in again.stderr.splitlines()[-1]
    )


@pytest.mark.slow
def test_killed_and_restarted_ends_with_the_same_bytes(finished, command, survive, tmp_path):
    line = command("train", CONFIG, tmp_path / "work", *SMALL)
    survive(line, tmp_path / "work", finished)
    for name in ("results.json", "loss.csv", "projector.safetensors"):
        assert (tmp_path / "work" / name).read_bytes() == (finished / name).read_bytes()
