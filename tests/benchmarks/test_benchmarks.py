"""Our own side of every benchmark runs, and does what its table says. Rivals are not installed here.

The programs are tiny and run once: compiling them is what takes the time.
"""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from benchmarks import clock, collect, evidence, harness, kernels, profile, work

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NAMES = ("sweep", "dictionary", "counts", "lens", "score", "generate", "prefill", "finetune")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> work.Work:
    return work.make(work.SIZES["tiny"], tmp_path_factory.mktemp("work"), pictures=2)


@pytest.mark.parametrize("name", NAMES)
def test_our_sides(name, done):
    benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    assert benchmark.name == name
    series, differences = harness.measure(benchmark, done, (), 1, harness.ENVIRONMENTS)
    assert max(differences.values()) <= harness.TOLERANCE
    found = harness.report(benchmark, done, series, differences)
    assert found["sides"][harness.OURS]["ratio"] == [1.0]
    assert name in harness.table(json.loads(json.dumps(found)))


@pytest.mark.parametrize("name", NAMES)
def test_every_rival_has_the_task_and_every_bound_a_side(name, done):
    benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    for rival in benchmark.rivals:
        source = (harness.ROOT / "benchmarks" / "rivals" / f"{rival}.py").read_text()
        assert f"def {name}(work: Work" in source
        requirements = f"{harness.ENVIRONMENT[rival]}.txt"
        assert (harness.ROOT / "benchmarks" / "rivals" / "requirements" / requirements).exists()
    one = harness.Series(*np.ones((3, 1)))
    sides = dict.fromkeys((*benchmark.sides(done), *benchmark.rivals), one)
    for bound in benchmark.bounds:
        assert np.isfinite(bound.value(sides)).all()


def test_ablations_of_the_sweep_differ(done):
    logits = importlib.import_module("benchmarks.sweep").sides(done)[harness.OURS]()["logits"]
    edits = done.size.edits
    assert logits.shape == (edits, 2, 4)
    apart = np.abs(logits[:, None] - logits[None]).max((2, 3)) / np.abs(logits).max()
    assert (apart[~np.eye(edits, dtype=bool)] > 10 * harness.TOLERANCE).all()


def test_results_that_differ_are_not_believed(done):
    ours = {"logits": np.array([1.0, 10.0]), "ids": np.array([3, 4, 5, 6])}
    theirs = {"logits": np.array([1.0, 9.0]), "ids": np.array([3, 4, 5, 7])}
    assert harness.difference(ours, ours, codes=("ids",)) == 0
    assert harness.difference(ours, theirs, codes=("ids",)) == 0.25
    with pytest.raises(ValueError, match="results are"):
        harness.difference(ours, {"logits": theirs["logits"]})

    def sides(_):
        return {harness.OURS: lambda: ours, "other": lambda: theirs}

    wrong = harness.Benchmark(name="wrong", about="", sides=sides)
    with pytest.raises(ValueError, match="results of other differ from ours"):
        harness.measure(wrong, done, (), 1, harness.ENVIRONMENTS)


def test_a_rival_that_is_not_installed(done, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks.install --rivals=nnsight"):
        harness.Rival("nnsight", "sweep", done.directory, tmp_path)


def test_memory_rise():
    lap = clock.lap(lambda: np.ones(2**24).sum())
    assert lap.result == 2**24 and lap.seconds > 0
    if lap.rise is not None:
        assert 2**26 < lap.rise < 2**29  # 128 MiB


def test_time_is_divided_among_what_is_under_way():
    spans = [("a", 0.0, 4e9), ("b", 1e9, 3e9)]
    assert profile._divide(spans) == {"a": 3.0, "b": 1.0}


def test_kernels(capsys):
    parts = kernels.main(["--size=tiny", "--pictures=2", "--rounds=1"])
    assert {"LM attention", "vision attention", "LM norms", "head", "projector"} <= set(parts)
    assert all(seconds > 0 for seconds in parts.values())
    assert "LM attention" in capsys.readouterr().out


def test_collect(capsys):
    rates = collect.main(["--vectors=100", "--width=32", "--rounds=1"])
    assert len(rates) == 6 and all(rate > 0 for rate in rates.values())
    assert "bfloat16, read from disk" in capsys.readouterr().out


def test_evidence(done):
    found, ratios = evidence.measure(done.model, done.batches, 1)
    assert ratios.shape == (1,) and found["ratio"] == ratios[0] > 0
