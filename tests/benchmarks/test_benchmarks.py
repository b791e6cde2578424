"""Our own side of every benchmark runs, and does what its table says. Rivals are not installed here.

The programs are tiny and run once: compiling them is what takes the time.
"""

from __future__ import annotations

import functools
import importlib
import json

import jax
import numpy as np
import pytest

from benchmarks import accelerator, chip, clock, collect, evidence, harness, kernels, profile, work
from tests.helpers import tiers

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NAMES = (
    "sweep", "dictionary", "counts", "lens", "score", "generate", "prefill", "finetune",
    "finetune_lora",
)  # fmt: skip
QUICK = ("sweep", "counts", "generate", "score")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> work.Work:
    return work.make(work.SIZES["tiny"], tmp_path_factory.mktemp("work"), pictures=2)


@pytest.mark.parametrize("name", tiers.slow_except(QUICK, NAMES))
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


def test_a_rival_that_is_not_installed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks.install --rivals=nnsight"):
        harness.interpreter("nnsight", tmp_path)


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


@pytest.mark.slow
def test_the_accelerator_command(tmp_path, capsys):
    """On a CPU, with a rival in a process of its own, which gives the same results."""
    pytest.importorskip("torch")
    path = tmp_path / "found.json"
    tasks = "prefill,generate 1,FT-LoRA,load"
    argv = ["--tiny", "--rounds=1", "--dtype=float32", "--rivals=hf_careful", f"--tasks={tasks}"]
    found = accelerator.main([*argv, f"--json={path}"])
    assert json.loads(path.read_text())["tasks"] == json.loads(json.dumps(found["tasks"]))
    assert set(found["checks"]) == {"prefill", "generate 1", "FT-LoRA"}
    assert 0 < found["checks"]["prefill"]["bfloat16"] < 0.1
    for task in found["tasks"]:
        ours, theirs = (task["sides"][side] for side in (harness.OURS, "hf_careful"))
        assert not ours["error"] and not theirs["error"]
        assert ours["ratio"] == 1 and theirs["ratio"] == theirs["median"] / ours["median"]
        if task["task"] != "load":
            assert theirs["difference"] <= harness.TOLERANCE
    by_name = {task["task"]: task for task in found["tasks"]}
    assert by_name["prefill"]["share"] > 0 and by_name["generate 1"]["share"] > 0
    assert by_name["generate 1"]["bounds"][0]["least"] == 3
    assert "share of the chip's rate" in capsys.readouterr().out


def test_accelerator_states_what_is_missing(capsys):
    for argv, message in (
        ([], "JAX finds no accelerator; --tiny"),
        (["--tasks=prefil"], "'prefil' is not one of prefill, counts"),
        (["--rivals=jax"], "jax: there are hf_careful"),
    ):
        with pytest.raises(SystemExit):
            accelerator.main(argv)
        assert message in capsys.readouterr().err


def test_a_side_that_fails_is_reported(done):
    calls = []

    def run():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return {"logits": np.ones(3)}

    lap = functools.partial(clock.lap, run)
    side = accelerator.measure(lap, lap, 5)
    assert side.error == "MemoryError: no room" and len(side.seconds) == 1
    task = accelerator.TASKS["sweep"]
    sides = {harness.OURS: side, "hf_careful": accelerator.Side(seconds=[1e9], first=1.0)}
    found = accelerator.report("sweep", task, sides, None)
    assert found["bounds"][0]["kept"] and "no room" in accelerator.lines(found)
    slow = sides | {"hf_careful": accelerator.Side(seconds=[1e-9], first=1.0)}
    assert "MISSED" in accelerator.lines(accelerator.report("sweep", task, slow, None))


def test_products_are_counted(done):
    """A prefill multiplies every token by the weights of every layer, and its scores."""
    config, B = done.size.config, done.fields["pictures"]
    T, lm = done.inputs["ids"].shape[1], config.lm
    layers = sum(leaf.size for leaf in jax.tree.leaves(done.model.lm.layers) if leaf.ndim == 3)
    language = 2 * B * T * layers + 4 * B * T * T * lm.layers * lm.heads * lm.head_width
    counted = chip.products("prefill", done)
    assert language < counted < 2.5 * language
    step, lora = chip.products("finetune", done), chip.products("finetune_lora", done)
    assert step is not None and language < step < lora
    assert chip.products("sweep", done) is None
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(done.model.lm))
    assert weights / 2 < chip.decoded_bytes(done) < 1.5 * weights
