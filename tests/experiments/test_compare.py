"""Runs side by side: what differs, differences with the intervals that the data allow, neurons."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from experiments.compare import numbers, runs, study
from mllm_jax.analysis import intervals


def finished(folder, results, *, data="same", **config):
    """A folder as a study leaves it."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"format": 2, **results}))
    manifest = {"config": config, "data": {"test": data}, "versions": {"jax": "1"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def evaluated(folder, right, **options):
    """A run of the evaluation with these answers, as its steps and results hold them."""
    middle = intervals.mean(np.asarray(right, float))
    row = {"accuracy": float(middle.value), "low": float(middle.low), "high": float(middle.high)}
    accuracy = {"reds": {"choice": row | {"chance": 0.25, "n": len(right)}}}
    finished(folder, {"study": "evaluate", "accuracy": accuracy}, **options)
    (folder / "steps").mkdir()
    np.savez(folder / "steps/reds-choice.npz", right=np.asarray(right, bool))
    return folder


NAME = "accuracy / reds / choice / accuracy"
BEFORE = [1, 0, 1, 0, 0, 1, 0, 0, 1, 0]
AFTER = [1, 1, 1, 0, 1, 1, 0, 0, 1, 1]


def test_numbers_have_names_that_runs_share():
    results = {
        "format": 2, "study": "x", "tokens": {"lm": [3, 4]},
        "ablation": [
            {"mask": "a", "draw": 1, "accuracy": 0.5, "difference": -0.1, "low": -0.2, "high": 0.0},
            {"mask": "b", "draw": None, "accuracy": 0.7, "difference": 0.0, "low": None, "high": 1},
        ],
        "bootstrap": {"value": [1.0, 2.0], "low": [0.5, 1.5], "high": [1.5, 2.5]},
        "effect": [[1.0], [2.0]], "low": [[0.0], [1.0]], "high": [[2.0], [3.0]],
        "text": "no number", "flag": True, "gap": None,
        "evidence": {"neurons": [{"layer": 3, "entropy": 0.1}]}, "pictures": [{"by_layer": [1.0]}],
    }  # fmt: skip
    assert numbers.numbers(results) == {
        "tokens / lm / 0": (3, None, None),
        "tokens / lm / 1": (4, None, None),
        "ablation / [a, 1] / difference": (-0.1, -0.2, 0.0),
        "ablation / [a, 1] / accuracy": (0.5, None, None),
        "ablation / [b] / difference": (0.0, None, None),
        "ablation / [b] / accuracy": (0.7, None, None),
        "bootstrap / 0": (1.0, 0.5, 1.5),
        "bootstrap / 1": (2.0, 1.5, 2.5),
        "effect / 0 / 0": (1.0, 0.0, 2.0),
        "effect / 1 / 0": (2.0, 1.0, 3.0),
    }


def test_a_damaged_step_or_mask_is_named(tmp_path):
    first, other = runs.read([evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER)])
    for file in ("steps/reds-choice.npz", "masks.npz"):
        (tmp_path / "b" / file).write_bytes(
            (tmp_path / "a/steps/reds-choice.npz").read_bytes()[:80]
        )
    with pytest.raises(ValueError, match="b/steps/reds-choice.npz is damaged"):
        study.difference(first, other, NAME)
    with pytest.raises(ValueError, match="b/masks.npz is damaged"):
        other.masks()


def test_the_same_examples_are_paired(tmp_path):
    first, other = runs.read(
        [evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER, seed=1)]
    )
    got = study.difference(first, other, NAME)
    change = np.array(AFTER) - np.array(BEFORE)
    want = intervals.mean(change.astype(float))
    assert got == (0.3, float(want.low), float(want.high), 10)
    rows = {row["setting"]: row["values"] for row in study.settings([first, other])}
    assert rows == {"config": ["{}", ""], "config.seed": ["", "1"]}


def test_other_examples_are_not(tmp_path):
    first, other = runs.read(
        [evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER, data="others")]
    )
    got = study.difference(first, other, NAME)
    a, b = first.numbers[NAME], other.numbers[NAME]
    low = 0.3 - math.sqrt((b.value - b.low) ** 2 + (a.high - a.value) ** 2)
    high = 0.3 + math.sqrt((b.high - b.value) ** 2 + (a.value - a.low) ** 2)
    np.testing.assert_allclose(got, (0.3, low, high, 0), atol=1e-12)
    assert study.difference(first, other, "accuracy / reds / choice / n") == (0, None, None, 0)
    np.savez(tmp_path / "b/steps/reds-choice.npz", right=np.ones(10, bool))
    assert other.examples(NAME) is None  # not the examples of this number


def test_scores_of_ablations_are_paired(tmp_path):
    folders = []
    for name, scores in (("a", [1, 0, 1]), ("b", [0, 0, 1])):
        row = {"module": "all", "mask": "x", "data": "y", "control": None, "draw": None}
        mean = float(np.mean(np.array(scores) - [1, 1, 1]))
        row |= {"difference": mean, "low": mean - 0.1, "high": mean + 0.1, "accuracy": 0.5}
        folder = finished(tmp_path / name, {"study": "domain_neurons", "ablation": [row]})
        (folder / "steps/scores/y").mkdir(parents=True)
        np.savez(folder / "steps/scores/y/clean.npz", score=np.ones(3))
        np.savez(folder / "steps/scores/y/all-x-selected.npz", score=np.array(scores, float))
        folders.append(folder)
    first, other = runs.read(folders)
    got = study.difference(first, other, "ablation / [all, x, y] / difference")
    np.testing.assert_allclose((got.value, got.examples), (-1 / 3, 3))


def test_neurons_of_both_and_by_chance(tmp_path):
    results = {"study": "domain_neurons", "ablation": []}
    folders = [finished(tmp_path / name, results) for name in "abc"]
    rng = np.random.default_rng(0)
    masks = [rng.random((2, 3, 50)) < 0.2 for _ in range(2)] + [np.ones((2, 3, 40), bool)]
    for folder, mask in zip(folders, masks, strict=True):
        np.savez(folder / "masks.npz", **{"lm.mlp.act": mask, "domains": np.array(["x", "y"])})
    rows = study.overlap(runs.read(folders))
    assert [row["neurons of"] for row in rows] == ["lm.mlp.act / x", "lm.mlp.act / y"]
    for row, a, b in zip(rows, *masks[:2], strict=True):
        assert row["runs"] == ["a", "b"] and row["both"] == (a & b).sum()
        np.testing.assert_allclose(row["jaccard"], (a & b).sum() / (a | b).sum())
        expected = a.sum() * b.sum() / a.size
        np.testing.assert_allclose(row["chance"], expected / (a.sum() + b.sum() - expected))


def test_the_page_and_the_tables(tmp_path):
    hostile = "<b>x</b>"
    folders = [
        evaluated(tmp_path / "one/work", BEFORE),
        evaluated(tmp_path / "two/work", AFTER, name=hostile),
    ]
    study.run([str(folder) for folder in folders], str(tmp_path / "out"))
    html = (tmp_path / "out/index.html").read_text()
    assert hostile not in html and "&lt;b&gt;x&lt;/b&gt;" in html
    with (tmp_path / "out/tables/numbers.csv").open() as file:
        rows = {row["number"]: row for row in csv.DictReader(file)}
    assert float(rows[NAME]["one/work"]) == 0.4
    got = rows[NAME]
    assert float(got["two/work - one/work"]) == pytest.approx(0.3)
    assert got["two/work - one/work examples"] == "10"
    assert rows["accuracy / reds / choice / n"]["two/work - one/work low"] == ""
    assert "+0.300 [" in html and "settings.csv" in html
    before = html
    study.run([str(folder) for folder in folders], str(tmp_path / "out"))
    assert (tmp_path / "out/index.html").read_text() == before
    with pytest.raises(ValueError, match="belongs to another config"):
        study.run([str(folder) for folder in folders[::-1]], str(tmp_path / "out"))


def test_what_cannot_be_compared_is_refused(tmp_path):
    whole = evaluated(tmp_path / "whole", BEFORE)
    half = evaluated(tmp_path / "half", BEFORE)
    (half / "manifest.json").unlink()
    other = finished(tmp_path / "other", {"study": "mask"})
    old = finished(tmp_path / "old", {"study": "evaluate", "format": 1})
    cut = evaluated(tmp_path / "cut", BEFORE)
    (cut / "results.json").write_text('{"format": 2, ')
    for folder, message in (
        (half, r"half is not a finished study: it has no manifest.json"),
        (other, r"other is a run of mask, but .*whole is one of evaluate"),
        (old, r"old: its results.json has format 1"),
        (cut, r"results.json is damaged"),
        (tmp_path, r"is not a finished study: it has no results.json"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            runs.read([whole, folder])
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.slow
def test_the_command_line(tmp_path):
    def compare(*arguments):
        command = [sys.executable, "-m", "experiments.compare", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    folders = [evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER)]
    done = compare(*folders, f"--workdir={tmp_path / 'out'}")
    assert done.returncode == 0 and done.stdout.startswith("finished: ")
    for arguments, message in (
        (folders[:1], "error: name two finished runs or more"),
        ((folders[0], folders[0]), "error: a run is named twice"),
        ((*folders, f"--workdir={folders[0]}"), "is one of the runs"),
        ((folders[0], tmp_path / "gone"), "gone does not exist"),
        ((folders[0], tmp_path), "is not a finished study"),
    ):
        refused = compare(*arguments)
        assert refused.returncode == 1 and message in refused.stderr
        assert refused.stderr.count("\n") == 1
