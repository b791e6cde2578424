"""Runs `on_mesh.py` in processes of 8 fake devices."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys

import pytest

CASES = pathlib.Path(__file__).parents[1] / "helpers" / "on_mesh.py"


def run(shape: str, families: str, *more: str) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "MESH": shape,
        "FAMILIES": families,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        [*command, *more], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]


FAMILIES = (
    "llava", "siglip_qwen2", "llava_next", "llava_onevision", "instructblip", "paligemma", "gemma3",
    "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "mistral3",
    "llava_pixtral",
)  # fmt: skip


def cases():
    """One of them is for CI."""
    for shape, family in itertools.product(("2x4", "8x1", "1x8", "1x1x8", "2x2x2"), FAMILIES):
        first = (shape, family) == ("2x4", "llava")
        yield pytest.param(shape, family, marks=() if first else pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "family"), list(cases()))
def test_a_mesh_gives_what_one_device_gives(shape, family):
    run(shape, family)


@pytest.mark.slow
def test_a_pass_gathers_nothing_large():
    """Of one family of each kind of vision encoder and projector; the long tests take all."""
    families = "instructblip gemma3 internvl qwen2_5_vl idefics3 mistral3"
    run("2x4", families, "-k", "gathered and run")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1x1x8", "2x2x2"])
def test_chips_that_share_one_copy_gather_one_layer_at_a_time(shape):
    run(shape, "llava", "-k", "layer_in_use")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("shape", ["2x1", "1x2"])
def test_two_processes_give_what_one_device_gives(shape):
    """All passes; what a program of the user's own gives, only that program can bring home."""
    passes = "run or generate or sample or score or sweep or reduce or fit or share or alone"
    command = [
        sys.executable, "-m", "experiments.launch", "--processes=2", "--",
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES), "-k", passes,
    ]  # fmt: skip
    environment = os.environ | {"MESH": shape, "FAMILIES": "llava", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
