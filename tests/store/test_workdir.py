"""A file is whole or not there; a study's folder belongs to one config."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from mllm_jax import store
from mllm_jax.store import Workdir


def files(path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def test_work_without_its_config_is_not_continued(tmp_path):
    Workdir(tmp_path, {"seed": 0}).claim(data=1)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json that says of which"):
        Workdir(tmp_path, {"seed": 1})
    Workdir(tmp_path, {"seed": 1}, restart=True).claim(data=1)
    assert store.read_json(tmp_path / "config.json") == {"seed": 1}


@pytest.mark.parametrize("old", [None, "old"])
def test_a_write_that_is_broken_off_leaves_what_was(tmp_path, old):
    path = tmp_path / "result.json"
    if old:
        path.write_text(old)

    def break_off():
        with store.atomic(path) as file:
            file.write(b"half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert files(tmp_path) == (["result.json"] if old else [])
    assert not old or path.read_text() == old


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "open"])
def test_a_full_disk(tmp_path, monkeypatch, step):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        monkeypatch.setattr(json, "dumps", lambda *_, **__: _Text(full))
    elif step == "open":
        monkeypatch.setattr("builtins.open", full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=r"cannot write .*result.json: No space left on device; free"):
        store.atomic_json(path, {"new": 1})
    monkeypatch.undo()
    assert path.read_text() == "old" and files(tmp_path) == ["result.json"]


class _Text(str):
    """Text that cannot be written: its bytes do not fit on the disk."""

    def __new__(cls, full):
        text = super().__new__(cls, "x")
        text.encode = full
        return text

    def __add__(self, other):
        return self


def test_a_file_is_as_readable_as_others(tmp_path):
    (tmp_path / "plain").write_text("")
    store.write(tmp_path / "deep" / "atomic", "text")
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert len(modes) == 1
    assert (tmp_path / "deep" / "atomic").read_text() == "text"


def test_the_same_value_is_the_same_bytes(tmp_path):
    store.atomic_json(tmp_path / "a", {"x": 1, "y": [2.5, None]})
    store.atomic_json(tmp_path / "b", {"y": [2.5, None], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert store.read_json(tmp_path / "a") == {"x": 1, "y": [2.5, None]}
    with pytest.raises(ValueError):
        store.atomic_json(tmp_path / "a", {"x": float("nan")})  # no JSON
    assert store.read_json(tmp_path / "a")["x"] == 1


def test_a_workdir_belongs_to_one_config(tmp_path):
    config = {"seed": 1, "layers": (1, 2), "rate": 0.5}
    Workdir(tmp_path / "study", {"seed": 7})  # refused for another reason, before any work
    Workdir(tmp_path / "study", config)
    assert store.read_json(tmp_path / "study" / "config.json")["rate"] == 0.5
    Workdir(tmp_path / "study", config).json("step", dict)
    Workdir(tmp_path / "study", dict(reversed(config.items())))
    message = (
        r"study belongs to another config \(it differs in rate, seed\): choose another --workdir"
    )
    with pytest.raises(ValueError, match=message):
        Workdir(tmp_path / "study", {"seed": 2, "layers": [1, 2]})
    assert json.loads((tmp_path / "study" / "config.json").read_text())["seed"] == 1


def test_a_step_is_done_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"a": np.arange(3), "b": np.ones((2, 2), np.float32)}

    for _ in range(2):  # as after a kill
        found = Workdir(tmp_path, {}).arrays("counts", make)
        np.testing.assert_array_equal(found["a"], [0, 1, 2])
        assert found["b"].dtype == np.float32
    assert len(calls) == 1
    assert [Workdir(tmp_path, {}).json("n", lambda n=n: {"n": n}) for n in (1, 2)] == [{"n": 1}] * 2
    kept = ["config.json", "steps/counts.npz", "steps/n.json"]
    assert files(tmp_path) == [".written", *kept]
    assert (tmp_path / ".written").read_text().split() == kept


def test_a_step_that_fails_is_done_again(tmp_path):
    study = Workdir(tmp_path, {})

    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        study.arrays("counts", fail)
    assert study.arrays("counts", lambda: {"a": np.ones(1)})["a"] == 1


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "steps").mkdir()
    np.savez(tmp_path / "steps" / "bad.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        Workdir(tmp_path, {}).arrays("bad", dict)


def test_pictures(tmp_path):
    picture = PIL.Image.new("RGB", (2, 1), (1, 2, 3))
    name = store.save_figure(Workdir(tmp_path, {}), "one.png", picture)
    assert name == "figures/one.png"
    read = PIL.Image.open(io.BytesIO((tmp_path / name).read_bytes()))
    assert read.getpixel((1, 0)) == (1, 2, 3)


def test_fingerprints_tell_arrays_apart():
    same = [store.fingerprint({"a": np.arange(4.0), "b": 1}) for _ in range(2)]
    assert same[0] == same[1]
    others = [
        {"a": np.arange(4.0), "b": 2},
        {"a": np.arange(4.0).reshape(2, 2), "b": 1},
        {"a": np.arange(4.0, dtype=np.float32), "b": 1},
        {"c": np.arange(4.0), "b": 1},
        {"a": np.arange(8.0)[::2] / 2, "b": 3},
    ]
    assert len({same[0], *map(store.fingerprint, others)}) == 6


def test_a_manifest_says_what_made_the_result(tmp_path):
    store.write_manifest(Workdir(tmp_path, {"seed": 3}), model="abc")
    found = store.read_json(tmp_path / "manifest.json")
    assert found["config"] == {"seed": 3} and found["model"] == "abc"
    assert {"jax", "numpy"} <= set(found["versions"])


def test_temporaries_of_killed_processes_go(tmp_path):
    """Those of processes that are dead, and of this host."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = f".a.npz.{store.files._HOST}.{{}}.partial".format
    left, live = tmp_path / name(dead.pid), tmp_path / name(os.getppid())
    other = tmp_path / f".a.npz.elsewhere.{dead.pid}.partial"
    for path in (left, live, other):
        path.write_text("half")
    store.write(tmp_path / "b", "whole")
    assert live.exists() and other.exists() and not left.exists()


def test_a_workdir_belongs_to_what_claims_it(tmp_path):
    def begin(**how):
        work = Workdir(tmp_path / "work", {}, restart=how.pop("restart", False))
        work.claim(**{"model": np.ones(2), "data": {"a": ["x"], "b": ["y"]}} | how)
        return work

    begin().arrays("counts", lambda: {"a": np.arange(2)})
    assert begin().arrays("counts", None)["a"].tolist() == [0, 1]
    for how, differs in (
        ({"model": np.zeros(2)}, "model"),
        ({"data": {"a": ["x"], "b": ["z"]}}, r"data \(b\)"),
        ({"data": {"a": ["x"]}}, r"data \(b\)"),
        ({"files": {"masks": "1"}}, "files"),
    ):
        with pytest.raises(ValueError, match=f"work was made for .* it differs in {differs}; give"):
            begin(**how)
    work = begin(model=np.zeros(2), restart=True)
    assert work.arrays("counts", lambda: {"a": np.ones(1)})["a"].tolist() == [1]


def test_steps_of_another_workdir_are_refused(tmp_path):
    for name in ("one", "two"):
        work = Workdir(tmp_path / name, {})
        work.claim(model=name)
        work.arrays("counts", lambda: {"a": np.arange(2)})
        work.json("n", lambda: [1])
    for step in ("counts.npz", "n.json"):
        shutil.copy(tmp_path / "one" / "steps" / step, tmp_path / "two" / "steps" / step)
        with pytest.raises(ValueError, match=f"{step} was made for something else.*in model"):
            getattr(work, {"npz": "arrays", "json": "json"}[step[-4:].strip(".")])(
                step.split(".")[0], None
            )


def test_a_damaged_json_step_is_refused(tmp_path):
    work = Workdir(tmp_path, {})
    work.json("n", lambda: {"n": 123})
    path = tmp_path / "steps" / "n.json"
    for damage in (path.read_text().replace("123", "124"), path.read_text()[:-4], "", "[]"):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"n.json (is damaged|was made for something else)"):
            work.json("n", None)


def test_restart_removes_no_file_of_others(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    work = Workdir(tmp_path / "work", {})
    work.arrays("counts", lambda: {"a": np.arange(2)})
    (work / "steps" / "mine").write_text("mine")
    with (work / ".written").open("a") as journal:
        journal.write(f"../outside.txt\n{outside}\nsteps/gone\n")
    again = Workdir(tmp_path / "work", {"other": 1}, restart=True)
    assert files(tmp_path) == [
        "outside.txt", "work/.written", "work/config.json", "work/steps/mine"
    ]  # fmt: skip
    assert again.arrays("counts", lambda: {"a": np.ones(1)})["a"].tolist() == [1]


@pytest.mark.parametrize("name", ["", "  "])
def test_a_workdir_has_a_name(name):
    with pytest.raises(ValueError, match="the name of the workdir is empty"):
        Workdir(name, {})
