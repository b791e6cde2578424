"""A checkpoint is whole or refused, whenever its run was killed and whatever happened to a file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.store import Workdir
from mllm_jax.training.checkpoint import Checkpoint
from tests.helpers import killed, spread

ARRAYS = {
    "kernel": np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32),
    "moment": np.float32(np.pi),
    "count": np.int32(7),
    "half": np.arange(5, dtype=jnp.bfloat16),
}


def saved(folder, items=("one", "two"), **parts):
    checkpoint = Checkpoint(folder, **{"model": np.arange(3)} | parts)
    for item in checkpoint.resume(items) if checkpoint.find() else items:
        checkpoint.add(item)
    checkpoint.save({name: jnp.asarray(array) for name, array in ARRAYS.items()})
    return folder


def loaded(folder, **parts):
    checkpoint = Checkpoint(folder, **{"model": np.arange(3)} | parts)
    assert checkpoint.find()
    return checkpoint.load({name: jnp.zeros_like(array) for name, array in ARRAYS.items()})


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_is_loaded_with_its_bytes(tmp_path):
    for name, array in loaded(saved(tmp_path)).items():
        assert array.dtype == ARRAYS[name].dtype, name
        assert np.asarray(array).tobytes() == ARRAYS[name].tobytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "steps"]


def test_a_part_alone_is_loaded(tmp_path):
    checkpoint = Checkpoint(saved(tmp_path), model=np.arange(3))
    assert checkpoint.find()
    got = checkpoint.load(dict.fromkeys(ARRAYS, ...) | {"count": jnp.int32(0)})
    assert got["count"] == 7 and got["kernel"] is ...


def test_the_step_before_is_removed_and_files_of_others_stay(tmp_path):
    saved(tmp_path, ["one"])
    (tmp_path / "notes.txt").write_text("of the user")
    saved(tmp_path, ["one", "two", "three"])
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["3"]
    Checkpoint(tmp_path, restart=True, model=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_file_is_refused_by_name(damage, tmp_path):
    """Every file of a step with something in it, one at a time; and nothing is changed by that."""
    folder, rng = saved(tmp_path), np.random.default_rng(0)
    paths = [path for path in files_of(folder / "steps") if path.stat().st_size]
    assert len(paths) > 3
    for path in paths:
        content = bytearray(path.read_bytes())
        whole = bytes(content)
        if damage == "flip":
            content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
        if damage == "missing":
            path.unlink()
        with pytest.raises(ValueError, match=f"{path} is damaged .*: remove it, or start") as said:
            loaded(folder)
        assert "\n" not in str(said.value)
        path.write_bytes(whole)
    loaded(folder)


def test_a_damaged_record_is_refused(tmp_path):
    """Nothing but the arrays that were saved comes out of a record with a changed byte."""
    path = saved(tmp_path) / "checkpoint.json"
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    changed = [content[:20], b"", b"[]", b"{}"]
    for place in rng.choice(len(content), 60, replace=False):
        flip = bytes([content[place] ^ (1 << int(rng.integers(7)))])
        changed.append(content[:place] + flip + content[place + 1 :])
    for text in changed:
        path.write_bytes(text)
        try:
            np.testing.assert_array_equal(loaded(tmp_path)["kernel"], ARRAYS["kernel"])
        except ValueError as error:
            assert "checkpoint.json" in str(error) or "/steps/" in str(error)
            assert "\n" not in str(error) and len(str(error)) < 400 + len(str(tmp_path))
            refused += 1
    assert refused > 50


def test_another_key_is_refused(tmp_path):
    saved(tmp_path)
    before = [(path, path.read_bytes()) for path in files_of(tmp_path)]
    with pytest.raises(ValueError, match=r"checkpoint.json was made for .* it differs in model;"):
        loaded(tmp_path, model=np.arange(4))
    assert [(path, path.read_bytes()) for path in files_of(tmp_path)] == before


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(tmp_path, capfd, monkeypatch):
    """No file may grow beyond some bytes, which the system says as it says that a disk is full."""
    saved(tmp_path, ["one"])
    before = (tmp_path / "checkpoint.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*/steps/2: File too large; free") as said:
            saved(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(said.value) and capfd.readouterr().err == ""
    assert (tmp_path / "checkpoint.json").read_bytes() == before
    np.testing.assert_array_equal(loaded(tmp_path)["kernel"], ARRAYS["kernel"])
    saved(tmp_path)  # with space again
    assert json.loads((tmp_path / "checkpoint.json").read_text())["done"] == 2
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["2"]


@pytest.mark.parametrize(
    ("moment", "done"),
    [
        ("in Orbax", killed.KILLED - 1),
        pytest.param("before the record", killed.KILLED - 1, marks=pytest.mark.slow),
        pytest.param("after the record", killed.KILLED, marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_saves_it_ends_with_the_same_bytes(moment, done, tmp_path):
    same_program = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # as in this process, see conftest
    ended = subprocess.run(
        [sys.executable, killed.__file__, tmp_path, moment], env=os.environ | same_program,
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert json.loads((tmp_path / "checkpoint.json").read_text())["done"] == done
    left = {path.name for path in (tmp_path / "steps").iterdir()}
    assert len(left) == 2 and str(done) in left, left  # the new step, or a part of it, and the last
    want, whole = killed.train()
    got, curve = killed.train(tmp_path)
    assert curve.tobytes() == whole.tobytes()
    kernels = [np.asarray(model["projector"]["kernel"]) for model in (got, want)]
    assert kernels[0].tobytes() == kernels[1].tobytes()
    assert [path.name for path in (tmp_path / "steps").iterdir()] == [str(killed.STEPS)]


def test_restart_of_a_workdir_removes_steps(tmp_path):
    """With what a killed run left there, whose files no journal names."""
    workdir = Workdir(tmp_path / "work", {})
    folder = saved(workdir / "checkpoints")
    shutil.copytree(folder / "steps" / "2", folder / "steps" / "3.orbax-checkpoint-tmp")
    Workdir(tmp_path / "work", {}, restart=True)
    assert not folder.exists()


@pytest.mark.slow
def test_two_processes_save_and_load_their_own_parts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.launch", "--processes=2", "--",
         sys.executable, spread.__file__, str(tmp_path / "spread")],
        env=os.environ | {"XLA_FLAGS": ""}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and "loaded\n" in done.stdout, done
    assert sorted(path.name for path in (tmp_path / "spread" / "steps").iterdir()) == ["2"]
