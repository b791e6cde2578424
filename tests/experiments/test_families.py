"""Every study on every kind of family: free grids, tiles, pictures and prompts that look forward."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from experiments.das import study as das
from experiments.describe import description
from mllm_jax.store import Workdir
from tests.helpers import studies, study_checkpoints

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SWEEP = "configs/embedded_sweep.py:tokens"
SMALL = {
    "domain_neurons": {
        "splits": 2, "resamples": 4, "shuffles": 19, "controls": 1, "random_controls": 1, "entropy_controls": 1,
        "picture_layers": 2,
    },
    "projection": {
        "rows": 4, "depth": ("Original",), "train_per_task": 8, "neurons.pictures": 4,
        "proj.steps": 2, "e2e.steps": 2, "probe.epochs": 2, "factors.tasks": (),
    },
    "attribution": {"off": (4,), "controls": 1, "steps": 0},
    "mask": {"steps": 2, "controls": 1},
    "das": {"steps": 2, "layers": (1,), "rank": 2, "controls": 1, "test_pairs": 4},
    "lens": {"layers": (), "word_layers": (0,)},
    "train": {"projector": "random", "steps": 2},
    "sweep": {"pairs_per_domain": 1, "batch_size": 1},
}  # fmt: skip
QUICK = {("sweep", "qwen2.5-vl"), ("train", "paligemma"), ("train", "idefics3")}
FAMILIES = [name for name in study_checkpoints.FAMILIES if name != "gemma3-text"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The checkpoint of a family, written once."""
    root, written = tmp_path_factory.mktemp("families"), {}

    def write(family):
        if family not in written:
            written[family] = study_checkpoints.write(family, root / family)
        return written[family]

    return write


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tuple(study_checkpoints.write_domains(tmp_path_factory.mktemp("shapes")))


@pytest.fixture
def run(config_of, checkpoints, paths, tmp_path):
    """Runs a study on a family, at its smallest: the workdir."""

    def one(study, family):
        name, fields = studies.STUDIES[study]
        config = config_of(SWEEP if study == "sweep" else name, paths=paths)
        config.update_from_flattened_dict(fields)
        config.update_from_flattened_dict(SMALL.get(study, {}))
        config.model = str(checkpoints(family))
        workdir = Workdir(tmp_path / "work", config.to_dict())
        importlib.import_module(f"experiments.{study}.study").run(config, workdir)
        return workdir

    return one


def marks(study, family):
    quick = (study, family) in QUICK
    return [pytest.mark.slow] if quick else [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    ("study", "family"),
    [
        pytest.param(study, family, marks=marks(study, family))
        for study in studies.STUDIES
        for family in FAMILIES
    ],
)
def test_a_study_ends_with_its_results(study, family, run, monkeypatch):
    if study == "das":  # a model of random numbers gives all pictures one answer
        monkeypatch.setattr(das, "answer", lambda study, split: {"label": np.arange(8) % 2})
    workdir = run(study, family)
    results = json.loads((workdir / "results.json").read_text())
    assert results["study"] == study
    text = (workdir / "results.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    if study == "sweep":
        *rows, question, last = results["columns"]
        assert rows == [f"picture row {r}" for r in range(len(rows))] and len(rows) > 1
        assert (question, last) == ("question", "last token")
        effect = np.abs(results["effect"])
        assert effect[:-1].max() > 0
        assert effect[-1, :-1].max() < 1e-6 < effect[-1, -1]  # nothing else is read after it
    if study == "domain_neurons":
        assert len(results["pictures"]) == 2
        for entry in results["pictures"]:
            assert (workdir / entry["image"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("study", studies.STUDIES)
def test_a_model_without_pictures_is_refused_in_one_line(study, run):
    with pytest.raises(ValueError, match="reads only text|has no projector") as said:
        run(study, "gemma3-text")
    assert "\n" not in str(said.value) and len(str(said.value)) < 400


@pytest.mark.parametrize("family", study_checkpoints.FAMILIES)
def test_any_family_is_described(family):
    config, _ = study_checkpoints.FAMILIES[family]()
    found = description.describe(config)
    assert found["parameters"]["all"] == sum(list(found["parameters"].values())[:-1])
    assert {"layers": config.lm.layers, "width": config.lm.mlp} == found["neurons"]["lm.mlp.act"]
    assert description.page(family, found)
