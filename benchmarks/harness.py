"""Measure sides in turns: a round is one run of every side, and ratios are computed by round.

Each rival runs in its own process (`rivals.serve`); sides of this library run in this one. The
results of all sides must agree before they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import clock, work
from mllm_jax.numerics import products
from mllm_jax.store import atomic_json

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENTS = ROOT / "benchmarks" / ".environments"
ENVIRONMENT = {  # rival -> the environment it runs in
    "hf_careful": "hf",
    "hf_compiled": "hf",
    "hf_ordinary": "hf",
    "hf_trainer": "hf",
    "hf_trainer_cached": "hf",
    "mmneuron": "hf",
    "mmneuron_no_grad": "hf",
    "transformer_lens": "transformer_lens",
    "transformer_lens_reuse": "transformer_lens",
    "nnsight": "nnsight",
    "nnsight_reuse": "nnsight",
}
OURS = "mllm_jax"
TOLERANCE = 1e-3

Result = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Series:
    """The measurements of one side by round.

    Attributes:
      seconds: float64[rounds], wall-clock time.
      cpu: float64[rounds], CPU time of all threads.
      rise: float64[rounds], the rise of resident memory in bytes; NaN where it is not known.
    """

    seconds: np.ndarray
    cpu: np.ndarray
    rise: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bound:
    """A bound on a number of each round.

    Attributes:
      what: A description of the number.
      value: Computes the number from the series by side.
      least: The lower bound, if there is one.
      most: The upper bound, otherwise.
    """

    what: str
    value: Callable[[dict[str, Series]], np.ndarray]
    least: float | None = None
    most: float | None = None

    def kept(self, value: float) -> bool:
        """Return whether a value lies within the bound."""
        if self.most is not None:
            return value <= self.most
        return self.least is not None and value >= self.least

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.most is None else f"at most {self.most:g}"


def faster(rival: str, times: float) -> Bound:
    """Return the bound that this library is so many times faster than a rival."""
    return Bound(
        f"time of {rival} / time of {OURS}",
        lambda series: series[rival].seconds / series[OURS].seconds,
        least=times,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
      name: The name of the table, and of the function of each rival.
      about: A description in one line.
      sides: Makes the sides of this library from the work, by name, OURS first. A side that
        returns nothing is only timed.
      rivals: The names of the rivals.
      bounds: The bounds; those of a side that is not measured are skipped.
      pictures: The number of rows of the work.
      codes: Results that are ids, compared by the share that differs.
      eigen: Whether Eigen computes matrix products, see `products`.
    """

    name: str
    about: str
    sides: Callable[[work.Work], dict[str, Callable[[], Any]]]
    rivals: tuple[str, ...] = ()
    bounds: tuple[Bound, ...] = ()
    pictures: int = work.BATCH
    codes: tuple[str, ...] = ()
    eigen: bool = False


class Rival:
    """The process of a rival; a context manager.

    Args:
      name: The name of the rival.
      directory: The folder of the work.
      python: Its interpreter, see `interpreter`.
    """

    def __init__(self, name: str, directory: pathlib.Path, python: pathlib.Path):
        self.name, self.totals = name, dict[tuple[str, int], float]()
        self.log = directory / f"{name}.log"
        command = [python, "-m", "benchmarks.rivals.serve", name, directory]
        threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, text=True, env=os.environ | threads,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self.process.kill()  # it may be in the middle of a long task
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def first(self, task: str, pictures: int) -> clock.Lap:
        """Prepare a task, run it once and return its result and measurements."""
        answer = self._ask(task, pictures)
        with np.load(answer["result"]) as file:
            result = dict(file)
        self.totals[task, pictures] = sum(float(np.abs(value).sum()) for value in result.values())
        return clock.Lap(result, answer["seconds"], np.nan, None, answer["peak"])

    def lap(self, task: str, pictures: int) -> clock.Lap:
        """Run a prepared task once and return its measurements."""
        answer, total = self._ask(task, pictures), self.totals[task, pictures]
        if abs(answer["total"] - total) > TOLERANCE * abs(total):
            raise ValueError(f"{self.name} gave {total} first and {answer['total']} now")
        measured = (answer[name] for name in ("seconds", "cpu", "rise", "peak"))
        return clock.Lap(None, *measured)

    def _ask(self, task: str, pictures: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"task": task, "pictures": pictures}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)


def interpreter(name: str, environments: pathlib.Path) -> pathlib.Path:
    """Return the interpreter of the environment in which a rival is installed."""
    python = environments / ENVIRONMENT[name] / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"the rival {name} is not installed in {environments}: "
            f"python -m benchmarks.install --rivals={name}"
        )
    return python


def difference(ours: Result, theirs: Result, codes: tuple[str, ...] = ()) -> float:
    """Return the largest difference of results, relative to the largest value.

    Args:
      ours: The results of this library.
      theirs: Those of another side.
      codes: The names of results that are ids, whose difference is the share that differs.
    """
    if set(ours) != set(theirs):
        raise ValueError(f"results are {sorted(ours)} on one side and {sorted(theirs)}")
    differences = []
    for name, mine in ours.items():
        other = theirs[name]
        if mine.shape != other.shape:
            raise ValueError(f"{name} is {mine.shape} on one side and {other.shape} on the other")
        if name in codes:
            differences.append(float(np.mean(mine != other)))
        else:
            differences.append(float(np.abs(mine - other).max() / np.abs(other).max()))
    return max(differences)


def measure(
    benchmark: Benchmark,
    done: work.Work,
    rivals: tuple[str, ...],
    rounds: int,
    environments: pathlib.Path,
) -> tuple[dict[str, Series], dict[str, float]]:
    """Measure all sides.

    Args:
      benchmark: The benchmark.
      done: Its work.
      rivals: The rivals to measure.
      rounds: The number of rounds.
      environments: The folder of the environments of the rivals.

    Returns:
      The series, and the differences from our results, by side.

    Raises:
      ValueError: The results of a side differ from ours.
    """
    sides = benchmark.sides(done)
    results = {name: run() for name, run in sides.items()}  # compiles and warms up
    laps: dict[str, Callable[[], clock.Lap]] = {
        name: functools.partial(clock.lap, run) for name, run in sides.items()
    }
    with contextlib.ExitStack() as stack:
        task = benchmark.name, done.fields["pictures"]
        for name in rivals:
            process = Rival(name, done.directory, interpreter(name, environments))
            rival = stack.enter_context(process)
            results[name] = rival.first(*task).result
            laps[name] = functools.partial(rival.lap, *task)
        differences = {
            name: difference(results[OURS], result, benchmark.codes)
            for name, result in results.items()
            if result
        }
        for name, value in differences.items():
            if not value <= TOLERANCE:
                raise ValueError(f"the results of {name} differ from ours by {value:.2g}")
        taken: dict[str, list[clock.Lap]] = {name: [] for name in laps}
        for round_ in range(rounds):
            for name in _turns(list(laps), round_):
                taken[name].append(laps[name]())
            print(f"round {round_ + 1} of {rounds}", file=sys.stderr)
    return {name: _series(measured) for name, measured in taken.items()}, differences


def _turns(names: list[str], round_: int) -> Iterator[str]:
    """Reverse the order in every other round, so that no side always follows the same one."""
    return reversed(names) if round_ % 2 else iter(names)


def _series(laps: list[clock.Lap]) -> Series:
    rises = [np.nan if lap.rise is None else lap.rise for lap in laps]
    return Series(
        np.array([lap.seconds for lap in laps]),
        np.array([lap.cpu for lap in laps]),
        np.array(rises, float),
    )


def report(
    benchmark: Benchmark,
    done: work.Work,
    series: dict[str, Series],
    differences: dict[str, float],
) -> dict[str, Any]:
    """Return all measurements as JSON values, with the ratios of each round."""
    ours = series[OURS].seconds
    bounds = []
    for bound in benchmark.bounds:
        try:
            values = bound.value(series)
        except KeyError:  # of a side that is not measured
            continue
        middle = float(np.median(values))
        bounds.append(
            {"what": bound.what, "bound": str(bound), "values": values.tolist(),
             "median": middle, "kept": bool(bound.kept(middle))}
        )  # fmt: skip
    sides = {
        name: {
            "seconds": s.seconds.tolist(),
            "cpu": s.cpu.tolist(),
            "ratio": (s.seconds / ours).tolist(),
            "cpu_ratio": (s.cpu / series[OURS].cpu).tolist(),
            "rise_mib": (s.rise / 2**20).tolist(),
            "difference": differences.get(name),
        }
        for name, s in series.items()
    }
    config = done.size.config
    return {
        "benchmark": benchmark.name,
        "about": benchmark.about,
        "work": {
            "pictures": done.fields["pictures"],
            "tokens": int(done.inputs["ids"].shape[1]),
            "image_tokens": config.image_tokens,
            "vision": [config.vision.run_layers, config.vision.width],
            "lm": [config.lm.layers, config.lm.width, config.lm.vocab],
        },
        "machine": {
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "jax": importlib.metadata.version("jax"),
        },
        "rounds": len(ours),
        "sides": sides,
        "bounds": bounds,
    }


def table(report: dict[str, Any]) -> str:
    """Return a report as text: a line for each side and for each bound."""
    w, machine = report["work"], report["machine"]
    lines = [
        f"{report['benchmark']}: {report['about']}",
        f"{w['pictures']} pictures, {w['tokens']} tokens a row ({w['image_tokens']} of image), "
        f"vision {w['vision'][0]} x {w['vision'][1]}, LM {w['lm'][0]} x {w['lm'][1]}, float32, "
        f"{machine['cores']} cores, load {machine['load'][0]:.1f}, {report['rounds']} rounds",
        "",
        f"{'side':24}{'seconds':>10}{'time / ours':>14}{'[least, most]':>18}{'cpu / ours':>12}"
        f"{'memory rise':>14}{'difference':>12}",
    ]
    for name, side in report["sides"].items():
        ratio, rise = np.array(side["ratio"]), np.median(side["rise_mib"])
        span = f"[{ratio.min():.2f}, {ratio.max():.2f}]"
        apart = "" if side["difference"] is None else f"{side['difference']:.1e}"
        lines.append(
            f"{name:24}{np.median(side['seconds']):10.3f}{np.median(ratio):14.2f}{span:>18}"
            f"{np.median(side['cpu_ratio']):12.2f}{rise:10.0f} MiB{apart:>12}"
        )
    lines.append("")
    for bound in report["bounds"]:
        values = np.array(bound["values"])
        mark = "kept" if bound["kept"] else "MISSED"
        lines.append(
            f"{bound['what']}: {bound['median']:.2f} [{values.min():.2f}, {values.max():.2f}], "
            f"{bound['bound']}: {mark}"
        )
    return "\n".join(lines)


def run(benchmark: Benchmark, argv: list[str] | None = None) -> dict[str, Any]:
    """Run a benchmark from the command line, and return its report."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}", description=benchmark.about
    )
    parser.add_argument("--size", choices=work.SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rivals",
        default=",".join(benchmark.rivals),
        help="the names of rivals, separated by commas; may be empty",
    )
    parser.add_argument("--pictures", type=int, help=f"by default {benchmark.pictures}")
    parser.add_argument("--edits", type=int, help="the number of ablations of the sweep")
    parser.add_argument("--json", type=pathlib.Path, help="the file to write all rounds to")
    parser.add_argument("--environments", type=pathlib.Path, default=ENVIRONMENTS)
    args = parser.parse_args(argv)
    rivals = tuple(name for name in args.rivals.split(",") if name)
    if wrong := [name for name in rivals if name not in benchmark.rivals]:
        parser.error(f"{', '.join(wrong)}: the rivals are {', '.join(benchmark.rivals) or 'none'}")
    if benchmark.eigen:
        products.prefer_eigen()
    size = work.SIZES[args.size]
    if args.edits:
        size = dataclasses.replace(size, edits=args.edits)
    pictures = args.pictures or benchmark.pictures
    with tempfile.TemporaryDirectory() as directory:
        done = work.make(size, pathlib.Path(directory), pictures)
        series, differences = measure(
            benchmark, done, rivals, args.rounds, args.environments.absolute()
        )
    measured = report(benchmark, done, series, differences)
    print(table(measured))
    if args.json:
        atomic_json(args.json, measured)
    return measured


def timed(run: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """Return a side that is only timed."""

    def side() -> None:
        jax.block_until_ready(run(*args))

    return side
