"""Several processes do what one does, write once, and fail together."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import launch
from tests.helpers.studies import ENVIRONMENT, EVALUATE, ROOT, assert_close, several

SMALL = ("--config.test_per_domain=3", "--config.batch_size=2", "--config.styles=('choice',)")
CAPTURES = "--captures=fire=stats lm.mlp.act by=kind; seen=stats vision.mlp.act"


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
    line[line.index("experiments.evaluate")] = "tests.helpers.fails"
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
hosts.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
hosts.barrier("here")
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
    assert "error: not all 2 processes connected to 127.0.0.1" in done.stderr.splitlines()[-1]


def test_a_mesh_of_more_devices_than_there_are_is_one_line(command, execute, tmp_path):
    done = execute(command("evaluate", EVALUATE, tmp_path / "work", "--mesh=data=64"))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert "error: mesh(data=64, model=1, fsdp=1) needs 64 devices, there are only" in line


@pytest.mark.slow
def test_a_port_in_use_is_one_line(command, execute, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"--coordinator=127.0.0.1:{other.getsockname()[1]}"
        line = command("evaluate", EVALUATE, tmp_path / "work", where, "--processes=2")
        done = execute([*line, "--process=0"])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.endswith("(Address already in use); choose a free port")


def apart(line: list[str], *more: tuple[str, ...]) -> list[subprocess.CompletedProcess]:
    """Two processes of which each is given more flags of its own, or a folder to run in."""
    where = f"--coordinator=127.0.0.1:{launch._free_port()}"
    started = [
        subprocess.Popen(
            [*line, where, "--processes=2", f"--process={number}", *flags], text=True, cwd=ROOT,
            env=os.environ | ENVIRONMENT | environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number, (environment, *flags) in enumerate(more)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in started]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, "", text)
        for p, text in zip(started, said, strict=True)
    ]


def slowly(command, workdir: pathlib.Path, *more: str, count: int = 3) -> list[str]:
    small = "--config.batch_size=2"
    line = command("evaluate", EVALUATE, workdir, small, *more, count=count)
    line[line.index("experiments.evaluate")] = "tests.helpers.slowly"
    return line


@pytest.fixture
def others(checkpoint, tmp_path):
    """What process 1 may be given instead: flags, or the variables of its environment."""
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("another")
    for package in ("mllm_jax", "experiments", "tests", "configs"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package)
    with open(tmp_path / "code" / "experiments" / "context.py", "a") as file:
        file.write("# another version\n")
    return {
        "size": ({}, "--config.batch_size=4"),
        "paths": ({}, "--config.paths=('configs',)"),  # one more
        "workdir": ({}, f"--workdir={tmp_path}/elsewhere"),
        "mesh": ({}, "--mesh=model=2"),
        "model": ({}, f"--config.model={tmp_path}/model"),
        "code": ({"PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"},),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("size", "config.batch_size"),
        ("paths", "config.paths, content.paths[1]"),
        ("workdir", "flags.workdir"),
        ("mesh", "flags.mesh"),
        ("model", "config.model, content.model"),
        ("code", "code.experiments"),
    ],
)
def test_processes_that_differ_are_refused(kind, says, others, command, tmp_path):
    done = apart(slowly(command, tmp_path / "work", count=1), ({},), others[kind])
    for each in done:
        (line,) = each.stderr.splitlines()
        assert each.returncode == 1
        assert f"error: process 1 differs from process 0 in {says}" in line
    assert not (tmp_path / "work" / "steps").exists()


@pytest.mark.slow
def test_batches_that_do_not_divide_are_refused_before_anything_is_read(command, tmp_path):
    done = apart(slowly(command, tmp_path / "work", "--config.batch_size=3"), ({},), ({},))
    for each in done:
        (line,) = each.stderr.splitlines()
        assert each.returncode == 1
        assert (
            "error: config.batch_size=3: batches of 3 rows cannot be divided into the 2 data"
            in line
        )


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
@pytest.mark.long  # one process is killed in test_kills
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


@pytest.mark.slow
def test_sigterm_saves_and_a_restart_goes_on(finished, command, survive, tmp_path):
    """One process; the sums of a domain that is half counted are kept."""
    line = command("domain_neurons", QUICK, tmp_path / "work", *STUDY)
    survive(line, tmp_path / "work", finished, kill=subprocess.Popen.terminate)
    for name in ("results.json", "index.html"):
        assert (tmp_path / "work" / name).read_bytes() == (finished / name).read_bytes()
