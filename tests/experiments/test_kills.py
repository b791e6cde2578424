"""A run that is stopped, however it is, says one line, goes on when started again, and ends alike."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import IO

import pytest

from experiments.running import lock
from mllm_jax.store import stamps
from tests.helpers.studies import ENVIRONMENT, EVALUATE, LABELS, ROOT, STUDIES, several

pytestmark = pytest.mark.slow
LOST = "was lost (killed, or its host failed): finished work is saved; start again with the"
STOPPED = "finished work is saved; start again with the same flags to continue"


@pytest.fixture
def line(command, tmp_path):
    made = command("evaluate", EVALUATE, tmp_path / "work", "--config.batch_size=2", count=1)
    made[made.index("experiments.evaluate")] = "tests.helpers.slowly"
    return made


def start(line: list[str], stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen:
    return subprocess.Popen(
        line, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=stderr, text=True,
    )  # fmt: skip


def wait_for_step(number: int, workdir: pathlib.Path, process: subprocess.Popen) -> None:
    while not (workdir / "steps" / f"step-{number}.npz").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def children(process: subprocess.Popen) -> list[int]:
    found = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in found.split()]


def finish(line: list[str], workdir: pathlib.Path) -> None:
    """Started again, it ends with the result of one that was never stopped."""
    process = start(line)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and said == ""
    assert (workdir / "results.json").read_text() == '{\n "total": 20540\n}\n'  # 0 + 1 + 4 + ...
    names = {path.name for path in (workdir / "steps").iterdir()}
    assert names == {f"step-{number}.npz" for number in range(40)}


@pytest.mark.parametrize(
    ("numbers", "whom", "status", "says"),
    [
        (signal.SIGKILL, [1], 137, f"error: process 1 {LOST}"),
        (signal.SIGKILL, [0], 137, f"error: process 0 {LOST}"),
        (signal.SIGKILL, [0, 1], 137, f"error: process 0 was ended by SIGKILL: {STOPPED}"),
        (signal.SIGTERM, [1], 143, f"stopped by SIGTERM: {STOPPED}"),
        (signal.SIGTERM, None, 143, f"stopped by SIGTERM: {STOPPED}"),
        (signal.SIGINT, None, 130, f"stopped by Ctrl-C: {STOPPED}"),
    ],
)
def test_two_processes(numbers, whom, status, says, line, tmp_path):
    """`whom` it is sent to; None is the launcher."""
    process = start(several(line))
    wait_for_step(3, tmp_path / "work", process)
    pids = [process.pid] if whom is None else [children(process)[number] for number in whom]
    for pid in pids:
        os.kill(pid, numbers)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == status
    assert len(said) == 1 and says in said[0]
    finish(several(line), tmp_path / "work")


def test_a_process_that_is_stopped_for_a_while_is_waited_for(line, tmp_path):
    process = start(several(line))
    wait_for_step(3, tmp_path / "work", process)
    pid = children(process)[1]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(45)  # JAX's heartbeats were missed after 10 to 30
    os.kill(pid, signal.SIGCONT)
    assert process.communicate(timeout=100)[1] == "" and process.returncode == 0
    finish(several(line), tmp_path / "work")


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (signal.SIGINT, 130, f"stopped by Ctrl-C: {STOPPED}"),
        (signal.SIGTERM, 143, f"stopped by SIGTERM: {STOPPED}"),
    ],
)
def test_one_process_and_a_second_run_in_its_workdir(number, status, says, line, tmp_path):
    process = start(line)
    wait_for_step(2, tmp_path / "work", process)
    process.send_signal(signal.SIGSTOP)
    second = subprocess.run(
        line, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    process.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1
    assert f"another run (process {process.pid} of" in second.stderr
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == status and len(said) == 1 and says in said[0]
    finish(line, tmp_path / "work")


def test_ctrl_c_while_it_is_imported(line, tmp_path):
    process = start([sys.executable, "-X", "importtime", *line[1:]])
    for text in process.stderr:
        if text.endswith(" jax\n"):
            break
    process.send_signal(signal.SIGINT)
    said = [t for t in process.communicate(timeout=60)[1].splitlines() if "import time:" not in t]
    assert process.returncode == 130
    assert len(said) == 1 and f"stopped by Ctrl-C: {STOPPED}" in said[0]


@pytest.fixture
def line_of(command, config_of, folders, tmp_path):
    """The command of a small study, on labels that begin with different letters."""
    for folder in folders[:2]:
        for label in LABELS:
            named = tmp_path / "pictures" / folder.name / label.removeprefix("a ")
            shutil.copytree(folder / label, named)
    paths = tuple(str(tmp_path / "pictures" / folder.name) for folder in folders[:2])

    def make(study: str, workdir: pathlib.Path) -> list[str]:
        config, fields = STUDIES[study]
        fields = fields | {"paths": paths}
        known = config_of(config)
        flags = [
            f"--config.{name}={fields[name]}" for name in fields if name.partition(".")[0] in known
        ]
        line = command(study, config, workdir, *flags, count=0)
        line[2] = {"projection": "tests.helpers.narrow_probes"}.get(study, line[2])
        return line

    return make


def count_files(folder: pathlib.Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


# A random model gives all pictures one answer, which leaves das nothing to interchange.
ANSWERING = [name for name in STUDIES if name != "das"]


def results(folder: pathlib.Path) -> dict[str, bytes]:
    """What a study leaves, apart from times, places and Orbax's own records of its folders."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in files.items()
        if name.name not in ("manifest.json", lock.NAME, stamps.NAME)
        and name.parts[0] != "checkpoints"
    }


@pytest.mark.long
@pytest.mark.parametrize("study", ANSWERING)
def test_every_study_ends_alike_wherever_it_is_killed(study, line_of, tmp_path):
    """After three SIGKILL and one SIGTERM or Ctrl-C, at moments counted in files."""
    whole, work, log = (tmp_path / name for name in ("whole", "work", "log"))
    with log.open("w") as stderr:  # a pipe that nobody reads would stop the study when it is full
        assert start(line_of(study, whole), stderr).wait(900) == 0, log.read_text()[-2000:]
    dice = random.Random(study)
    signals = [signal.SIGKILL] * 3 + [dice.choice([signal.SIGTERM, signal.SIGINT])]
    dice.shuffle(signals)
    moments = sorted(dice.sample(range(2, len(results(whole))), len(signals)))
    for number, moment in zip(signals, moments, strict=True):
        with log.open("w") as stderr:
            process = start(line_of(study, work), stderr)
            while process.poll() is None and count_files(work) < moment:
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 0.5))
            process.send_signal(number)
            status = process.wait(300)
        last = log.read_text().strip().splitlines()[-1:]
        if number == signal.SIGKILL:
            assert status in (-number, 0), last
        else:
            assert status == 0 or (status == 128 + number and STOPPED in last[0]), last
    with log.open("w") as stderr:
        assert start(line_of(study, work), stderr).wait(900) == 0, log.read_text()[-2000:]
    assert results(work) == results(whole)
