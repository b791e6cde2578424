"""The description of a model: by shape alone, and the same as of the model itself."""

from __future__ import annotations

import json
import shutil
import sys

import jax
import pytest

from experiments.describe import description
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from tests.helpers import released


@pytest.fixture(scope="module")
def seven():
    return description.describe(llava.LlavaConfig.llava_1_5_7b())


def test_counts_and_bytes(seven):
    """What is known of LLaVA-1.5-7B: the LM, and the projector's "~20M" (Verma et al. 2024)."""
    D, F, V, E = 4096, 11008, 32064, 1024
    layer = 4 * D * D + 3 * D * F + 2 * D
    parameters = seven["parameters"]
    assert parameters["lm"] == 32 * layer + 2 * V * D + D
    assert parameters["projector"] == E * D + D + D * D + D == 20_979_712
    assert list(parameters) == ["vision", "projector", "lm", "all"]
    assert parameters["all"] == sum(parameters[m] for m in ("vision", "projector", "lm"))
    assert seven["bytes"]["float32"]["all"] == 2 * seven["bytes"]["bfloat16"]["all"]
    assert seven["bytes"]["bfloat16"]["lm"] == 2 * parameters["lm"]


def test_neurons_and_sites(seven):
    assert seven["neurons"] == {
        "vision.mlp.act": {"layers": 23, "width": 4096},
        "projector.act": {"layers": 1, "width": 4096},
        "lm.mlp.act": {"layers": 32, "width": 11008},
    }
    sites = {site["name"]: site for site in seven["sites"]}
    assert sites["lm.mlp.act"]["axes"] == ["L", "B", "T", "F"]
    assert sites["lm.mlp.act"]["shape"] == [32, 1, 576 + description.WORDS, 11008]
    assert sites["projector.out"]["shape"] == [1, 576, 4096]
    assert sites["logits"]["axes"] == ["B", "T", "V"] and sites["logits"]["shape"][-1] == 32064
    for site in seven["sites"]:
        assert len(site["axes"]) == len(site["shape"])


@pytest.mark.parametrize("name", released.EVERY)
def test_every_released_model(name):
    found = description.describe(description.find(name))
    assert found["parameters"]["all"] > 1e8
    towers = {"vision.mlp.act"} if "vision" in found["parameters"] else set()
    assert {"lm.mlp.act"} | towers <= found["neurons"].keys()
    assert towers or name in ("gemma-3-270m", "gemma-3-1b")


def test_parameters_are_those_of_the_model(tiny_model):
    found = description.describe(tiny_model.config)
    for module in ("vision", "projector", "lm"):
        leaves = jax.tree.leaves(getattr(tiny_model, module))
        assert found["parameters"][module] == sum(leaf.size for leaf in leaves)
        assert found["bytes"]["float32"][module] == sum(leaf.nbytes for leaf in leaves)
    tiles = description.describe(llava_next.LlavaNextConfig.tiny())
    assert tiles["parameters"]["newline"] == 32
    shapes = {site["name"]: site["shape"] for site in tiles["sites"]}
    assert shapes["vision.embed"][0] == 5  # tiles of the largest picture


def test_no_such_name(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, near in (
        ("llava-1.5-7", "nearest: llava-1.5-7b, llava-1.5-13b"),
        ("LLaVA_1.5_13B", "nearest: llava-1.5-13b"),
        ("xyz", "nearest: embedded, llava-1.5-7b"),
        ("somebody/llava-1.5-7b", "nearest of the released models: llava-1.5-7b"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            description.find(name)
        assert repr(name) in str(error.value) and near in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        description.find(str(tmp_path))


def test_an_adapter_is_described_by_the_model_that_it_changes(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(checkpoint)}))
    assert description.find(str(tmp_path)) == description.find(str(checkpoint))
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "lost/model"}))
    assert description.find(str(tmp_path), str(checkpoint)) == description.find(str(checkpoint))
    with pytest.raises(FileNotFoundError, match="the model that the adapter changes with --base"):
        description.find(str(tmp_path))
    config.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="base_model_name_or_path.*with --base"):
        description.find(str(tmp_path))


@pytest.mark.slow
def test_command(checkpoint, execute, tmp_path):
    """Of a directory without weights."""
    shutil.copy(checkpoint / "config.json", tmp_path)
    file = tmp_path / "described.json"
    command = [sys.executable, "-m", "experiments.describe"]
    done = execute([*command, f"--model={tmp_path}", f"--json={file}"])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["model"] == str(tmp_path) and found["config"]["lm"]["layers"] == 9
    assert f"{found['parameters']['all']:,} parameters" in done.stdout
    rows = [[cell.strip() for cell in row.split("|")] for row in done.stdout.splitlines()]
    assert ["", "lm.mlp.act", "9 x 48", "432", ""] in rows
    assert ["lm.resid_post", "L B T D", "9 x 1 x 36 x 32"] in [row[1:4] for row in rows]
    failed = execute([*command, "--model=lava"])
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("error: 'lava' is neither a released model")
