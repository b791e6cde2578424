"""Learned masks and subspaces on a tiny model: they do what is asked of them, and can be used."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mllm_jax as mj
from experiments.das import study as das
from experiments.mask import study as mask
from mllm_jax import sites as S
from mllm_jax.interventions import spec
from tests.helpers import in_process, tiny

SMALL = {"test_per_domain": 24, "controls": 1, "batch_size": 4, "model": "tiny"}
LABELS = ("not", "tree", "which")
# The last token sees the picture and nothing else: its answer is the picture's.
LOOK = spec.parse("knockout lm.attn to=last on=text")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise, each with a question whose answers the tiny tokenizer knows as one word."""
    images = (tiny.picture(i) for i in range(160))
    return in_process.write_questions(tmp_path_factory.mktemp("pictures"), images, LABELS)


@pytest.fixture(scope="module")
def study(tmp_path_factory, config_of, tiny_config, tiny_model, pictures):
    """Runs a study of the tiny model in this process; its folder."""

    def run(module, config: str, edits=None, folder=None, **fields):
        config = config_of(config, paths=(pictures,), **SMALL, **fields)
        folder = folder or tmp_path_factory.mktemp("learned") / "work"
        loaded = tiny_model, tiny.processor(tiny_config)
        return in_process.run(module, config, folder, loaded, edits)

    return run


@pytest.fixture(scope="module")
def masked(study):
    return study(
        mask, "configs/embedded_mask.py:quick", LOOK, styles=("category",), penalty=0.3,
        train_per_domain=24,
    )  # fmt: skip


@pytest.mark.slow
def test_a_mask_is_small_and_better_than_a_random_one(masked):
    results = json.loads((masked / "results.json").read_text())
    off = np.load(masked / "off.npy")
    assert off.shape == (4, 48)
    assert results["kept"] == sum(results["kept_by_layer"]) == (~off).sum()
    assert 0 < results["kept"] < 0.7 * off.size
    learned, random = (results["test"][name]["divergence"] for name in ("learned", "random0"))
    assert learned["mean"] < random["mean"]
    for name in ("index.html", "figures/kept.png", "figures/loss.png", "manifest.json",
                 "tables/kept.csv", "tables/test.csv", "tables/loss.csv"):  # fmt: skip
        assert (masked / name).stat().st_size > 20


@pytest.mark.slow
def test_what_is_off_is_an_address_of_the_command_line(masked):
    edits = spec.parse("ablate lm.mlp.act[@off.npy]", masked.path)
    off = np.load(masked / "off.npy")
    assert spec.digest(edits) == spec.digest(mj.ablate(S.lm.mlp.act[off]))


@pytest.fixture(scope="module")
def aligned(study):
    return study(
        das, "configs/embedded_das.py:quick", LOOK, style="category", layers=(3,), rank=4,
        rate=0.1, steps=150, train_per_domain=96, test_pairs=48,
    )  # fmt: skip


@pytest.mark.slow
def test_a_subspace_exchanges_answers(aligned):
    results = json.loads((aligned / "results.json").read_text())
    assert results["labels"] == list(LABELS)
    assert sum(results["answer_counts"]["train"]) == 96
    accuracy = {row["subspace"]: row["accuracy"] for row in results["interchange"]}
    assert accuracy["whole"] == 1  # after the last layer the state of the last token is all
    assert accuracy["learned"] > 0.7 > 0.4 > accuracy["random0"]
    basis = np.load(aligned / "basis-3.npy")
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    edits = spec.parse("project_out lm.resid_post[3] @basis-3.npy", aligned.path)
    assert spec.digest(edits) == spec.digest(mj.project_out(S.lm.resid_post[3], basis))
    for name in ("index.html", "figures/interchange.png", "figures/loss.png", "manifest.json",
                 "tables/interchange.csv", "tables/loss.csv"):  # fmt: skip
        assert (aligned / name).stat().st_size > 20


@pytest.mark.slow
def test_das_that_is_killed_ends_with_the_same_bytes(study, tmp_path):
    """It needs a model that answers, which the command line has not; see `test_kills`."""
    small = {
        "style": "category",
        "layers": (3,),
        "steps": 4,
        "train_per_domain": 24,
        "test_pairs": 8,
    }

    def run(name: str):
        return study(das, "configs/embedded_das.py:quick", LOOK, tmp_path / name, **small)

    whole = run("whole")
    for steps in range(len(list((whole / "steps").iterdir()))):
        with in_process.killed_after(steps):
            run("killed")
    in_process.assert_same_files(whole, run("killed"))


def test_pairs_have_different_answers():
    labels = np.array([0, 0, 1, 2, 0])
    found = das.pairs(labels, 50, seed=1)
    assert found.shape == (50, 2) and (labels[found[:, 0]] != labels[found[:, 1]]).all()
    assert set(found.ravel()) == set(range(5))
    np.testing.assert_array_equal(found, das.pairs(labels, 50, seed=1))
    with pytest.raises(ValueError, match="the model gives all pictures the same answer"):
        das.pairs(np.zeros(3, int), 2, seed=0)


def test_errors_come_before_anything_is_read(config_of):
    config = config_of("configs/embedded_mask.py", gate="hard", model="nowhere")
    with pytest.raises(
        ValueError, match="config.gate: 'hard' is not one of hard_concrete, sigmoid"
    ):
        mask.run(config, None)
    config = config_of("configs/embedded_das.py", model="nowhere")
    with pytest.raises(ValueError, match="takes no edits of the vision tower"):
        das.run(config, None, spec.parse("ablate vision.mlp.act"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layers": (3, 4)}, "config.layers: 4 is not a layer of the model, 0 to 3"),
        ({"layers": (-1,)}, "config.layers: -1 is not a layer of the model, 0 to 3"),
        ({"layers": ()}, "config.layers is empty"),
        ({"rank": 33}, "config.rank=33: the model's states have width 32"),
    ],
)
def test_subspaces_that_the_model_does_not_have(fields, says, config_of, tiny_model, tmp_path):
    config = config_of("configs/embedded_das.py", **{"layers": (3,)} | fields)
    with pytest.raises(ValueError, match=says):
        in_process.run(das, config, tmp_path / "work", (tiny_model, None))
