"""A tiny checkpoint and three tiny domains in folders, for the binaries to run on."""

from __future__ import annotations

import os
import pathlib
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from mllm_jax.families.llava import model as llava
from tests.helpers import studies


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """A random tiny LLaVA whose tokenizer knows bytes."""
    config = llava.LlavaConfig.of(llava.ClipConfig.tiny(), studies.LM, fold=2, image_token=257)
    size = {"height": config.vision.image_size, "width": config.vision.image_size}
    return studies.write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", config,
        image_processor_type="CLIPImageProcessor", size={"shortest_edge": size["width"]},
        crop_size=size,
    )  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list[pathlib.Path]:
    """Three domains: pictures of one colour each, labels in folders."""
    root = tmp_path_factory.mktemp("domains")
    random = np.random.default_rng(0)
    for channel, name in enumerate(("reds", "greens", "blues")):
        for label in studies.LABELS:
            folder = root / name / label
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = random.integers(0, 60, (24, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    return [root / name for name in ("reds", "greens", "blues")]


@pytest.fixture(scope="session")
def command(checkpoint, folders):
    """The command of a study on the tiny checkpoint and domains: command(study, workdir, ...)."""

    def make(study: str, config: str, workdir: pathlib.Path, *more: str, count: int = 3):
        paths = "".join(f"{str(folder)!r}," for folder in folders[:count])
        return [
            sys.executable, "-m", f"experiments.{study}", f"--config={studies.ROOT / config}",
            f"--workdir={workdir}", f"--config.model={checkpoint}", f"--config.paths=({paths})",
            *more,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="session")
def config_of():
    """A config file with some fields changed: config_of("configs/embedded.py:quick", seed=1).

    The name of a field may have dots: `**{"probe.epochs": 2}`.
    """

    def make(name: str, **fields):
        path, _, size = name.partition(":")
        config = runpy.run_path(str(studies.ROOT / path))["get_config"](*([size] if size else []))
        dotted = {field: value for field, value in fields.items() if "." in field}
        config.update({field: value for field, value in fields.items() if field not in dotted})
        config.update_from_flattened_dict(dotted)
        return config

    return make


@pytest.fixture(scope="session")
def execute():
    """Runs a command in the checkout; its result with the text of both streams."""

    def run(command: list[str], **how) -> subprocess.CompletedProcess:
        environment = os.environ | studies.ENVIRONMENT
        return subprocess.run(
            command,
            cwd=studies.ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            **how,
        )

    return run


@pytest.fixture(scope="session")
def survive():
    """Runs a command that is killed at random moments, until it ends by itself.

    The moments are counted in files of its workdir, so that they do not depend on the machine.
    One that is asked to end (SIGTERM) may also finish, when its last save is behind it.

    Args:
      finished: The workdir of one that was not killed. times: how often it is killed.
      kill: How; by default SIGKILL. restart: the command of the last start, if another.
    """

    def run(
        command: list[str],
        workdir: pathlib.Path,
        finished: pathlib.Path,
        *,
        kill: Callable[[subprocess.Popen], None] = subprocess.Popen.kill,
        times: int = 3,
        restart: list[str] | None = None,
    ) -> None:
        dice = random.Random(0)
        whole = _files(finished)
        stopped = 0
        for moment in sorted(dice.sample(range(2, max(3 + times, int(0.8 * whole))), times)):
            process = _start(command)
            while _files(workdir) < moment:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 0.5))
            assert process.poll() is None, "it ended before it was killed"
            kill(process)
            if process.wait() == 0:
                assert kill is subprocess.Popen.terminate, "it was killed, yet it ended well"
                break
            stopped += 1
        assert stopped, "it was never stopped"
        assert _start(restart or command).wait(600) == 0

    return run


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=studies.ROOT, env=os.environ | studies.ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _files(folder: pathlib.Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))
