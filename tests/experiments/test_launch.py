"""Several processes do what one does, write once, and fail together."""

from __future__ import annotations

import json
import pathlib
import sys
import time

import numpy as np
import pytest

from experiments import launch

EVALUATE = "configs/embedded_evaluate.py"
SMALL = ("--config.test_per_domain=3", "--config.batch_size=2", "--config.styles=('choice',)")
CAPTURES = "--captures=fire=stats lm.mlp.act by=kind; seen=stats vision.mlp.act"


def several(command: list[str], count: int = 2) -> list[str]:
    return [sys.executable, "-m", "experiments.launch", f"--processes={count}", "--", *command]


def test_two_processes_write_what_one_writes(command, execute, tmp_path):
    """Three rows in batches of two: the last batch is filled up."""
    for count in (1, 2):
        line = command("evaluate", EVALUATE, tmp_path / str(count), *SMALL, CAPTURES, count=2)
        done = execute(several(line, 2) if count == 2 else line)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "1", tmp_path / "2")


def assert_same(one: pathlib.Path, two: pathlib.Path) -> None:
    """The same files; integers and results are equal, of the manifest all but the processes."""
    names = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(two)) for path in two.rglob("*") if path.is_file()}
    assert (one / "results.json").read_bytes() == (two / "results.json").read_bytes()
    manifests = [json.loads((work / "manifest.json").read_text()) for work in (one, two)]
    assert [manifest.pop("processes") for manifest in manifests] == [1, 2]
    assert manifests[0] == manifests[1]
    for name in names:
        if name.endswith(".npz"):
            with np.load(one / name) as a, np.load(two / name) as b:
                for key in a.files:
                    if np.issubdtype(a[key].dtype, np.floating):
                        np.testing.assert_allclose(b[key], a[key], rtol=1e-5, atol=1e-5)
                    else:
                        np.testing.assert_array_equal(b[key], a[key])


def test_one_that_fails_ends_all_with_its_error(command, execute, tmp_path):
    line = command("evaluate", EVALUATE, tmp_path / "work")
    line[line.index("experiments.evaluate")] = "tests.experiments.fails"
    done = execute(several(line))
    assert done.returncode == 1
    says = [text for text in done.stderr.splitlines() if "the disk of the second host" in text]
    assert says == [
        "error: the disk of the second host is broken",
        "process 1 failed: error: the disk of the second host is broken",
    ]


@pytest.mark.slow  # it waits for the other for a while
def test_a_host_that_does_not_come_is_an_error(command, execute, tmp_path):
    where = f"--coordinator=127.0.0.1:{launch._free_port()}"
    line = command("evaluate", EVALUATE, tmp_path / "work", where, "--processes=2", "--process=0")
    start = time.monotonic()
    done = execute(line)
    assert done.returncode == 1 and time.monotonic() - start < 75
    assert "error: not all 2 processes came to 127.0.0.1" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--mesh=2x4", "error: --mesh=2x4: it is written as data=2,model=4,fsdp=1"),
        ("--mesh=data=64", "error: mesh(data=64, model=1, fsdp=1) needs 64 devices, there are"),
        ("--processes=2", "error: --processes=2: it is a number, with --coordinator=host:port"),
    ],
)
def test_flags_that_cannot_be_are_said_in_one_line(flag, says, command, execute, tmp_path):
    done = execute(command("evaluate", EVALUATE, tmp_path / "work", flag))
    assert done.returncode == 1 and says in done.stderr.splitlines()[-1]
