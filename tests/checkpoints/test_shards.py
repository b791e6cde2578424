"""Tables in shards: the same bytes however they were interrupted, and what was written is read."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mllm_jax.checkpoints import shards, tensors
from mllm_jax.store import stamps

ITEMS = list(range(7))
ROW = 3 * 2 + 8  # bytes of a row: three bfloat16, one int64


def rows_of(item: int):
    """From 0 to 6 rows."""
    value = np.arange(item * 3, dtype=np.float32).reshape(item, 3) + 100 * item
    return {"t": {"value": value.astype(ml_dtypes.bfloat16), "n": np.arange(item) + 10 * item}}


def store(folder, **how) -> shards.ShardStore:
    return shards.ShardStore(folder, **{"shard_bytes": 5 * ROW, "model": "m"} | how)


def fill(folder, items=ITEMS, **how) -> shards.ShardStore:
    made = store(folder, **how)
    for item in made.resume(items):
        made.append(item, rows_of(item), 2)
    made.flush()
    return made


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != stamps.NAME}


@pytest.fixture
def whole(tmp_path):
    fill(tmp_path / "whole")
    return tmp_path / "whole"


def expected(items=ITEMS):
    parts = [rows_of(item)["t"] for item in items]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("value", "n")}


def test_rows_are_read_in_any_order(whole):
    reader, want = shards.TableReader(whole, "t"), expected()
    assert len(reader) == len(want["n"]) == 21 and len(list(whole.glob("*.safetensors"))) == 3
    for indices in (np.random.default_rng(0).permutation(21), [20, 0, 0, -1, 7], []):
        taken = reader.take(np.array(indices, np.int64))
        for name, array in want.items():
            assert taken[name].dtype == array.dtype
            np.testing.assert_array_equal(taken[name], array[np.array(indices, int)])
    for wrong in (21, -22):
        with pytest.raises(IndexError, match=f"row {wrong} of 21"):
            reader.take(np.array([3, wrong]))
    with pytest.raises(KeyError, match="has no 'u'; it has: t"):
        shards.TableReader(whole, "u")


def test_another_reader_of_safetensors_reads_the_shards(whole):
    files = sorted(whole.glob("*.safetensors"))
    assert files[0].name == "00000000-00000004.safetensors"
    found = np.concatenate([safetensors.numpy.load_file(file)["t/n"] for file in files])
    np.testing.assert_array_equal(found, expected()["n"])


@pytest.mark.parametrize("after", range(8))
def test_interrupted_anywhere_it_ends_with_the_same_files(after, whole, tmp_path):
    fill(tmp_path / "parts", ITEMS[:after]) if after else None
    made = fill(tmp_path / "parts")
    assert made.examples == 14 and made.done == 7
    assert content(tmp_path / "parts") == content(whole)


SCRIPT = """
import os, signal, sys
from mllm_jax.checkpoints import shards, tensors
from mllm_jax.store import files
from tests.checkpoints import test_shards as t

folder, moment, calls = sys.argv[1], sys.argv[2], []

def killing(function):
    def call(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*args)
    return call

if moment == "before the record":
    files.atomic_json = killing(files.atomic_json)
else:  # the shard is complete and has no name yet
    os.replace = killing(os.replace)
t.fill(folder)
"""


@pytest.mark.parametrize("moment", ["before the record", "before its name"])
def test_killed_it_ends_with_the_same_files(moment, whole, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(folder), moment]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    left = content(folder)
    assert left != content(whole) and len(left) >= 2
    fill(folder)
    assert content(folder) == content(whole)


def test_a_full_disk_loses_nothing(whole, tmp_path, monkeypatch):
    folder, written = tmp_path / "full", []

    def write(rows, path, write=tensors.write):
        written.append(path)
        if len(written) == 3:
            with shards.files.naming_path(path):
                raise OSError(28, "No space left on device")
        write(rows, path)

    monkeypatch.setattr(shards.tensors, "write", write)
    with pytest.raises(OSError, match=r"cannot write .*: No space left on device; free some space"):
        fill(folder)
    assert len(shards.TableReader(folder, "t")) == 15
    fill(folder)
    assert content(folder) == content(whole)


def test_something_else_is_refused_and_stays(whole):
    before = content(whole)
    for how, says in (({"model": "other"}, "differs in model"), ({"more": 1}, "differs in more")):
        with pytest.raises(ValueError, match=f"record.json was made for .* it {says}; give"):
            fill(whole, **how)
    with pytest.raises(ValueError, match="contains 7, but only 2 are requested"):
        fill(whole, ITEMS[:2])
    with pytest.raises(ValueError, match=r"differs in data \(what the first 7 were\)"):
        fill(whole, [0, 1, 2, 3, 4, 6, 5])
    assert content(whole) == before
    fill(whole, ITEMS[:3], restart=True)
    assert len(shards.TableReader(whole, "t")) == 3 and len(content(whole)) == 2


def test_rows_of_another_shape_are_refused(tmp_path):
    made = store(tmp_path)
    made.append(6, rows_of(6), 1)  # a full shard
    with pytest.raises(ValueError, match=r"t/n of item 1 has rows \(\) in int32, earlier items"):
        made.append(7, {"t": rows_of(3)["t"] | {"n": np.zeros(3, np.int32)}}, 1)


def test_damage_is_refused_in_one_line(whole):
    victim = sorted(whole.glob("*.safetensors"))[1]
    good = victim.read_bytes()
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:-3], None):
        victim.unlink()
        if bad is not None:
            victim.write_bytes(bad)
        for use in (lambda: shards.TableReader(whole, "t"), lambda: fill(whole)):
            with pytest.raises(ValueError, match=f"{victim.name} is damaged") as refused:
                use()
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
        victim.write_bytes(good)
    record = json.loads((whole / shards.RECORD).read_text())
    for change in ({"shards": []}, {"shards": [{"file": "x"}]}, {"shards": 3}):
        (whole / shards.RECORD).write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match="record.json is damaged"):
            fill(whole)
    with pytest.raises(FileNotFoundError, match="record.json: missing"):
        shards.TableReader(whole / "nowhere", "t")
