"""The projection study, whole, on a tiny model and three tasks of noise in one colour each."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from mllm_jax.analysis import projection
from mllm_jax.data import domains, tasks
from tests.helpers import tiny_clip
from tests.helpers.studies import LABELS, assert_close, several

CONFIG = "configs/embedded_projection.py:quick"
SMALL = (
    "--config.tasks=()", "--config.seeds=(0, 1)", "--config.train_per_task=16",
    "--config.held_per_task=4", "--config.test_per_task=8", "--config.rows=4",
    "--config.proj.steps=3", "--config.e2e.steps=3", "--config.probe.epochs=3",
    "--config.depth=('Original', 'FT-E2E')",
    "--config.factors.tasks=('reds',)", "--config.neurons.pictures=4",
    "--config.suppress.task=greens", "--config.suppress.classes=('a circle', 'a square')",
    "--config.suppress.experts=20", "--config.neurons.train=('reds',)",
    "--config.neurons.top_rate=0.1", "--config.neurons.filter_rate=0.5",
    "--config.neurons.bar_rate=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    tiny_clip.write(directory)
    return directory


@pytest.fixture(scope="module")
def clip_flag(clip_directory):
    return f"--config.clip={clip_directory}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, execute, clip_flag):
    workdir = tmp_path_factory.mktemp("projection") / "work"
    done = execute(command("projection", CONFIG, workdir, *SMALL, clip_flag, count=2))
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


@pytest.mark.slow
def test_leaves_results_figures_tables_and_a_page(finished, results):
    assert set(results["tasks"]) == {"reds", "greens"}
    assert results["tasks"]["reds"]["classes"] == sorted(LABELS)
    assert (finished / "index.html").stat().st_size > 1000
    for name in ("answers", "richness", "claims", "depth", "factors", "neurons", "ablation"):
        assert (finished / "tables" / f"{name}.csv").stat().st_size > 50
    assert json.loads((finished / "manifest.json").read_text())["model"]
    assert not list((finished / "checkpoints").rglob("*")) or not [
        p for p in (finished / "checkpoints").rglob("*") if p.is_file()
    ]


@pytest.mark.slow
def test_every_variant_of_every_task_is_measured(results):
    variants = {(row["task"], row["variant"]) for row in results["answers"]}
    assert variants == {
        (task, variant)
        for task in results["tasks"]
        for variant in ("Random", projection.CLIP, "Original", "FT-Proj", "FT-E2E")
    }
    runs = {row["variant"]: row["runs"] for row in results["answers"]}
    assert runs.pop(projection.CLIP) == 1 and set(runs.values()) == {2}
    assert len(results["richness"]) == 2 * 4 * 4
    assert all(row["comparisons"] for row in results["claims"])
    assert len(results["depth"]) == 2 * 2 * 2 * 9
    assert {row["ablated"] for row in results["ablation"] if row["task"] == "reds"} == {
        "its domain's neurons", "random neurons", "neurons of most changed weights",
    }  # fmt: skip


@pytest.mark.slow
def test_factors_change_one_setting_at_a_time(results):
    rows = results["factors"]
    assert rows[0]["recipe"] == projection.PROJ and rows[0]["change"] is None
    assert {row["recipe"]: row["setting"] for row in rows[1:]} == {
        "template": "wording plain", "end of turn": "end False", "crop": "aspect square",
        "rate": "rate 0.001", "start": "start random",
        "all of them": "aspect square, end False, wording plain, rate 0.001",
    }  # fmt: skip
    same = {
        row["recipe"]
        for row in rows[1:]
        if results["losses"][f"reds/{row['recipe']}-0"] == results["losses"]["reds/FT-Proj-0"]
    }
    assert same == {"crop"}  # the pictures are squares


@pytest.mark.slow
def test_neurons_of_changed_weights_and_neurons_that_train_alone(finished, results):
    assert {
        (row["task"], row["variant"], row["seed"], row["domain neurons"])
        for row in results["changed"]
    } == {
        (task, "FT-E2E", seed, when)
        for task in results["tasks"] for seed in (0, 1) for when in ("before", "after")
    }  # fmt: skip
    moves = {
        (row["task"], row["variant"], row["seed"], row["module"]) for row in results["neurons"]
    }
    assert len(moves) == len(results["neurons"]) == 2 * 2 * 2 * 2
    assert all(0 <= row["jaccard"] <= 1 and row["neurons"] > 0 for row in results["changed"])
    with np.load(finished / "steps" / "runs" / "reds" / "FT-E2E-0" / "weights.npz") as file:
        assert file["weights/lm"].shape == (9, 48) and (file["weights/lm"] > 0).mean() > 0.5
    trained = {row["variant"]: row for row in results["trained"]}
    assert list(trained) == ["Original", "FT-Neurons", "FT-Random neurons", "FT-E2E"]
    assert trained["FT-Neurons"]["neurons"] == trained["FT-Random neurons"]["neurons"] > 0
    losses = [results["losses"][f"reds/{v}-0"] for v in ("FT-Neurons", "FT-Random neurons")]
    assert len(losses[0]) == 3 and losses[0][0] == losses[1][0] and losses[0] != losses[1]
    arrays = []
    for variant in ("Original-0", "FT-Neurons-0"):
        with np.load(finished / "steps" / "runs" / "reds" / variant / "projected.npz") as file:
            arrays.append(file["after/test"])
    np.testing.assert_array_equal(*arrays)  # the projector is frozen


@pytest.mark.slow
def test_what_trains_moves_and_nothing_else(finished):
    """FT-Proj changes what leaves the projector, and by that the answers; Original neither."""
    arrays = {}
    for variant in ("Original-0", "Original-1", "FT-Proj-0", "FT-E2E-0"):
        with np.load(finished / "steps" / "runs" / "reds" / variant / "projected.npz") as file:
            arrays[variant] = file["after/test"]
    np.testing.assert_array_equal(arrays["Original-0"], arrays["Original-1"])
    assert (arrays["Original-0"] != arrays["FT-Proj-0"]).any()
    assert (arrays["FT-Proj-0"] != arrays["FT-E2E-0"]).any()


def test_clip_is_a_variant_that_is_kept(clip_directory, folders, config_of, tmp_path, monkeypatch):
    from experiments.projection import study
    from mllm_jax import store

    reds = tasks.Task.from_domain(domains.Domain.from_folder(folders[0]), near_copy=None)
    own = {"reds": reds}
    reader = types.SimpleNamespace(config=types.SimpleNamespace(vision="a tower"))

    def of(clip):
        config = config_of(CONFIG, clip=str(clip), test_per_task=6)
        folder = store.Workdir(tmp_path / "work", {})
        return study.Study(config=config, workdir=folder, model=reader, processor=None, tasks=own)

    assert study.match(of("")) == {"reds": {}}
    with pytest.raises(FileNotFoundError, match="not a directory and not"):
        study.match(of("/no/such/clip"))
    said = study.match(of(clip_directory))["reds"][projection.CLIP]
    assert said.shape == (1, 6) and set(said[0]) <= set(range(len(LABELS)))
    monkeypatch.setattr(study.clip, "load", None)
    np.testing.assert_array_equal(study.match(of(clip_directory))["reds"][projection.CLIP], said)

    everything = dict.fromkeys((projection.ORIGINAL, projection.CLIP), said)
    measured = {"reds": projection.Task(reds.ids("test")[:6], len(LABELS), everything)}
    *_, last = projection.claims(measured)
    assert last["comparisons"] and "not measured" not in last["reason"]


def test_unknown_task_is_named(config_of, monkeypatch):
    from experiments.projection import study

    monkeypatch.setattr(tasks, "embedded", lambda seed: {"objects": None, "astronomy": None})
    with pytest.raises(
        ValueError, match=r"config.tasks: plants is not one of objects, astronomy, plantdoc, "
    ):
        study._tasks(config_of(CONFIG, tasks=("plants",)))


def test_errors_come_before_anything_is_read(config_of):
    from experiments.projection import study

    for fields, says in (
        ({"depth": ("FT",)}, "config.depth: 'FT' is not one of Original, FT-Proj, FT-E2E"),
        ({"neurons.train": ("reds",), "neurons.pictures": 0}, "config.neurons.train: set config.n"),
        ({"seeds": (1, 2)}, "config.factors.seeds: 0 is not one of config.seeds"),
    ):
        with pytest.raises(ValueError, match=says):
            study.run(config_of(CONFIG, model="nowhere", **fields), None)


@pytest.mark.slow
@pytest.mark.long  # that of the main study is not
def test_killed_and_restarted_ends_with_the_same_bytes(
    finished, command, survive, tmp_path, clip_flag
):
    line = command("projection", CONFIG, tmp_path / "work", *SMALL, clip_flag, count=2)
    survive(line, tmp_path / "work", finished)
    for name in ("results.json", "index.html"):
        assert (tmp_path / "work" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
@pytest.mark.long  # the study twice
def test_two_processes_find_what_one_finds(command, execute, tmp_path):
    small = (*SMALL, "--config.seeds=(0,)", "--config.train_per_task=8", "--config.proj.start=random",
             "--config.depth=('Original',)", "--config.factors.tasks=()")  # fmt: skip
    found = []
    for count in (1, 2):
        line = command("projection", CONFIG, tmp_path / str(count), *small, count=2)
        done = execute(several(line) if count == 2 else line)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / str(count) / "results.json").read_text()))
    assert_close(*found)
