"""Learned masks and subspaces on a tiny model: they do what is asked of them, and can be used."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mllm_jax as mj
from experiments import das, mask
from mllm_jax import sites as S
from mllm_jax.interventions import spec
from mllm_jax.workdir import Workdir

SMALL = {"train_per_domain": 4, "test_per_domain": 3, "controls": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def study(tmp_path_factory, config_of, checkpoint, folders):
    """Runs a study in this process; its folder."""

    def run(module, config: str, edits=None, **fields):
        paths = tuple(map(str, folders[:2]))
        config = config_of(config, model=str(checkpoint), paths=paths, **SMALL, **fields)
        workdir = Workdir(tmp_path_factory.mktemp("learned") / "work", config.to_dict())
        module.run(config, workdir, edits)
        return workdir

    return run


@pytest.fixture(scope="module")
def masked(study):
    return study(mask, "configs/embedded_mask.py:quick", styles=("category",), penalty=0.3)


def test_a_mask_is_small_and_better_than_a_random_one(masked):
    results = json.loads((masked / "results.json").read_text())
    off = np.load(masked / "off.npy")
    assert off.shape == (9, 48)
    assert results["kept"] == sum(results["kept_by_layer"]) == (~off).sum()
    assert 0 < results["kept"] < 0.7 * off.size
    learned, random = (results["test"][name]["divergence"] for name in ("learned", "random0"))
    assert learned["mean"] < random["mean"]
    for name in ("index.html", "figures/kept.png", "figures/loss.png", "manifest.json",
                 "tables/kept.csv", "tables/test.csv", "tables/loss.csv"):  # fmt: skip
        assert (masked / name).stat().st_size > 20


def test_what_is_off_is_an_address_of_the_command_line(masked):
    edits = spec.parse("ablate lm.mlp.act[@off.npy]", masked.path)
    off = np.load(masked / "off.npy")
    assert spec.digest(edits) == spec.digest(mj.ablate(S.lm.mlp.act[off]))


def test_pairs_have_different_answers():
    labels = np.array([0, 0, 1, 2, 0])
    found = das.pairs(labels, 50, seed=1)
    assert found.shape == (50, 2) and (labels[found[:, 0]] != labels[found[:, 1]]).all()
    assert set(found.ravel()) == set(range(5))
    np.testing.assert_array_equal(found, das.pairs(labels, 50, seed=1))
    with pytest.raises(ValueError, match="the model gives all pictures one answer"):
        das.pairs(np.zeros(3, int), 2, seed=0)


def test_errors_come_before_anything_is_read(config_of):
    config = config_of("configs/embedded_mask.py", gate="hard", model="nowhere")
    with pytest.raises(ValueError, match="config.gate='hard' is none of hard_concrete, sigmoid"):
        mask.run(config, None)
    config = config_of("configs/embedded_das.py", model="nowhere")
    with pytest.raises(ValueError, match="--edits of the vision tower are none"):
        das.run(config, None, spec.parse("ablate vision.mlp.act"))
