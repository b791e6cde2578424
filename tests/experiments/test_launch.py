"""Several processes do what one does, write once, and fail together."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
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


@pytest.mark.slow
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
                        # Sums over tokens cancel: their terms are of the order of the largest.
                        order = np.abs(a[key][np.isfinite(a[key])]).max(initial=1)
                        np.testing.assert_allclose(b[key], a[key], rtol=1e-5, atol=1e-5 * order)
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


OWN = """
import os, time
from mllm_jax.sharding import hosts
number, count = (int(os.environ[f"JAX_{name}"]) for name in ("PROCESS_ID", "NUM_PROCESSES"))
hosts.join(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
hosts.meet("here")
time.sleep(3 * number)
"""


@pytest.mark.slow
def test_a_program_of_ones_own_ends_well_though_one_is_late(execute):
    done = execute(several([sys.executable, "-c", OWN]))
    assert done.returncode == 0, done.stderr[-3000:]


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


QUICK = "configs/embedded.py:quick"
STUDY = (
    "--config.train_per_domain=20", "--config.test_per_domain=4", "--config.lens_per_domain=4",
    "--config.controls=1", "--config.batch_size=2", "--config.modules=('lm',)",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, execute):
    """The main study by one process, on one device."""
    workdir = tmp_path_factory.mktemp("study") / "one"
    done = execute(command("domain_neurons", QUICK, workdir, *STUDY))
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def kill_one(process: subprocess.Popen) -> None:
    """SIGKILL to the second of the processes of a launch."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children.split()[1]), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [subprocess.Popen.terminate, kill_one])
def test_two_that_are_killed_continue_as_one(kill, finished, command, survive, tmp_path):
    """Killed five times as two processes on two devices, then finished by one on one."""
    line = command("domain_neurons", QUICK, tmp_path / "work", *STUDY)
    survive(several(line), tmp_path / "work", finished, kill=kill, times=5, restart=line)
    one, two = (json.loads((w / "results.json").read_text()) for w in (finished, tmp_path / "work"))
    assert_close(one, two)


@pytest.mark.slow
def test_the_main_study_of_two_processes_is_that_of_one(finished, command, execute, tmp_path):
    done = execute(several(command("domain_neurons", QUICK, tmp_path / "work", *STUDY)))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((w / "results.json").read_text()) for w in (finished, tmp_path / "work"))
    assert_close(one, two)


def assert_close(one, two) -> None:
    """The same JSON; floats as near as sums in another order are."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    else:
        assert one == two


@pytest.mark.slow
def test_sigterm_saves_and_a_restart_goes_on(finished, command, survive, tmp_path):
    """One process; the sums of a domain that is half counted are kept."""
    line = command("domain_neurons", QUICK, tmp_path / "work", *STUDY)
    survive(line, tmp_path / "work", finished, kill=subprocess.Popen.terminate)
    for name in ("results.json", "index.html"):
        assert (tmp_path / "work" / name).read_bytes() == (finished / name).read_bytes()
