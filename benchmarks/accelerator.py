"""Measure this library and others on a GPU or TPU, with one LLaVA-1.5-7B of random weights.

    python -m benchmarks.accelerator [--tiny] [--tasks=NAME,...] [--rivals=NAME,...] [--json=FILE]

The library is checked first, on a tiny model: in float32 against the CPU of the same machine, and
in bfloat16 by the distance from float32. Then every rival runs its tasks in a process of its own,
one after another, and this library runs in this process. A rival is measured if its environment
(`python -m benchmarks.install`) is there, or this interpreter has its packages. `--tiny` runs all
of it on any machine, with a tiny model. FILE is written after every task.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import chip, clock, harness, work
from mllm_jax.store import atomic_json

ABOUT = "this library and others on an accelerator: LLaVA-1.5-7B, random weights"
PACKAGES = {  # environment of a rival -> what it imports
    "hf": ("torch", "transformers"),
    "nnsight": ("torch", "transformers", "nnsight"),
    "transformer_lens": ("torch", "transformers", "transformer_lens"),
}
RIVALS = ("hf_careful", "hf_compiled", "hf_ordinary", "nnsight", "transformer_lens")
LIMIT = 15.0  # seconds after which a side of a task is not run again
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured.

    Attributes:
      benchmark: The benchmark whose sides and rivals do it.
      pictures: The number of rows.
      bounds: By rival, how many times as long as this library it takes at least.
      share: The least share of the chip's measured rate, of products or, in decoding, of copies.
    """

    benchmark: str
    pictures: int
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    share: float | None = None

    def sides(self, done: work.Work) -> dict[str, Callable[[], Any]]:
        """Return the sides of this library by name, on the first pictures of the work."""
        return self.module().sides(done.first(self.pictures))

    def module(self) -> harness.Benchmark:
        """Return the benchmark."""
        return importlib.import_module(f"benchmarks.{self.benchmark}").BENCHMARK


TASKS = {
    "prefill": Task(benchmark="prefill", pictures=8, share=0.75),
    "counts": Task(benchmark="counts", pictures=16, bounds={"hf_careful": 1.2}),
    "sweep": Task(benchmark="sweep", pictures=8, bounds={"hf_careful": 2.5, "hf_compiled": 1.5}),
    "lens": Task(benchmark="lens", pictures=2, bounds={"hf_careful": 1.5}),
    "score": Task(benchmark="score", pictures=1, bounds={"hf_careful": 5}),
    "generate 1": Task(benchmark="generate", pictures=1, bounds={"hf_careful": 3}, share=0.7),
    "generate 8": Task(benchmark="generate", pictures=8, bounds={"hf_careful": 3}, share=0.7),
    "FT-Proj": Task(benchmark="finetune", pictures=32, bounds={"hf_careful": 1.3}),
    "FT-LoRA": Task(benchmark="finetune_lora", pictures=32),
    "load": Task(benchmark="load", pictures=1),
}
CHECKED_NARROW = ("prefill", "sweep", "lens", "score")  # not ids and losses, which a step changes
FLOAT32 = 1e-4  # the largest relative difference of float32 on two devices
NARROW = 2.0  # the largest distance of bfloat16 from float32, in that of the CPU


@dataclasses.dataclass
class Side:
    """The measurements of one side of a task.

    Attributes:
      seconds: Of each run after the first.
      first: Seconds of the first run, with compilation.
      peak: The most bytes of the device, see `clock.Lap`.
      result: The arrays that it gave, by name.
      error: What ended it, otherwise "".
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    first: float = float("nan")
    peak: int | None = None
    result: harness.Result = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return float(np.median(self.seconds)) if self.seconds else float("nan")


def full(dtype: str) -> work.Size:
    """Return the work of LLaVA-1.5-7B."""
    from mllm_jax import families

    config = families.RELEASED["llava-1.5-7b"]()
    config = dataclasses.replace(config, image_token=config.lm.vocab - 1)
    return work.Size(config=config, steps=64, fold=1, dtype=dtype)


def tiny(dtype: str) -> work.Size:
    """Return the work of a tiny model."""
    return dataclasses.replace(work.SIZES["tiny"], fold=1, dtype=dtype)


def check(tasks: Mapping[str, Task]) -> dict[str, dict[str, float]]:
    """Compare the device with the CPU on a tiny model.

    Returns:
      By task: `float32`, the largest relative difference of the results in float32; `bfloat16`
      and `bfloat16 on the CPU`, their distances from float32 on the CPU.

    Raises:
      ValueError: A difference is above FLOAT32, or a distance above NARROW times that of the CPU.
    """
    places = {"device": jax.local_devices()[0], "CPU": jax.local_devices(backend="cpu")[0]}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        made = {}
        for dtype in ("float32", "bfloat16"):
            folder = pathlib.Path(directory) / dtype
            folder.mkdir()
            made[dtype] = work.make(tiny(dtype), folder, max(t.pictures for t in tasks.values()))
        for name, task in tasks.items():
            if name == "load":
                continue

            def result(dtype: str, place: str, task: Task = task) -> harness.Result:
                done = made[dtype]
                with chip.default_device(places[place]):
                    model = jax.tree.map(jnp.asarray, jax.device_get(done.model))
                    return task.sides(dataclasses.replace(done, model=model))[harness.OURS]()

            exact = result("float32", "CPU")
            found[name] = {"float32": apart(result("float32", "device"), exact)}
            if not found[name]["float32"] <= FLOAT32:
                raise ValueError(f"{name}: float32 differs from the CPU by {found[name]}")
            if name in CHECKED_NARROW:
                for key, place in (("bfloat16", "device"), ("bfloat16 on the CPU", "CPU")):
                    found[name][key] = apart(result("bfloat16", place), exact)
                if not found[name]["bfloat16"] <= NARROW * found[name]["bfloat16 on the CPU"]:
                    raise ValueError(f"{name}: bfloat16 is far from float32: {found[name]}")
    return found


def apart(found: harness.Result, exact: harness.Result) -> float:
    """Return the largest difference of floats, relative to the largest value.

    Of results without floats, return the part of their sum by which they differ: an activation
    that rounds to the other side of zero counts a little.
    """
    floats = [name for name, values in exact.items() if values.dtype.kind == "f"]
    if floats:
        return harness.difference({n: found[n] for n in floats}, {n: exact[n] for n in floats})
    parts = (np.abs(found[n] - exact[n]).sum() / np.abs(exact[n]).sum() for n in exact)
    return float(max(parts))


def measure(first: Callable[[], clock.Lap], again: Callable[[], clock.Lap], rounds: int) -> Side:
    """Run a side until it has its rounds, or LIMIT seconds are over; an error ends it."""
    side, begin = Side(), time.perf_counter()
    try:
        lap = first()
        side.first, side.peak, side.result = lap.seconds, lap.peak, lap.result or {}
        while len(side.seconds) < rounds and (
            not side.seconds or time.perf_counter() - begin < LIMIT
        ):
            lap = again()
            side.seconds.append(lap.seconds)
            side.peak = max(side.peak or 0, lap.peak) if lap.peak is not None else side.peak
    except Exception as error:  # the others go on, and the table says which failed
        side.error = f"{type(error).__name__}: {error}"[-400:]
    return side


def measure_rival(
    name: str, tasks: Mapping[str, Task], done: work.Work, rounds: int, python: pathlib.Path
) -> dict[str, Side]:
    """Measure a rival on the tasks that it has; one that fails ends its process, not the others."""
    left = [task for task in tasks if name in tasks[task].module().rivals]
    sides: dict[str, Side] = {}
    while left:
        with harness.Rival(name, done.directory, python) as rival:
            while left:
                task = tasks[left[0]]
                how = task.benchmark, task.pictures
                first, again = (functools.partial(run, *how) for run in (rival.first, rival.lap))
                sides[left[0]] = measure(first, again, rounds)
                print(f"{name}, {left[0]}: {sides[left[0]].median:.4g} s", file=sys.stderr)
                if sides[left.pop(0)].error:
                    break
    return sides


def measure_ours(task: Task, done: work.Work, rounds: int) -> Side:
    """Measure this library on a task."""
    try:
        run = task.sides(done)[harness.OURS]
    except Exception as error:
        return Side(error=f"{type(error).__name__}: {error}"[-400:])
    lap = functools.partial(clock.lap, run)
    return measure(lap, lap, rounds)


def interpreters(rivals: tuple[str, ...], environments: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the interpreter of each rival that is installed: its own, otherwise this one."""
    found = {}
    for name in rivals:
        try:
            found[name] = harness.interpreter(name, environments)
        except FileNotFoundError as error:
            packages = PACKAGES[harness.ENVIRONMENT[name]]
            if all(map(importlib.util.find_spec, packages)):
                found[name] = pathlib.Path(sys.executable)
            else:
                print(error, file=sys.stderr)
    return found


def share(task: Task, done: work.Work, seconds: float, rates: Mapping[str, float]) -> float | None:
    """Return the share of the chip's measured rate that a task reaches, or None."""
    mine = done.first(task.pictures)
    if task.benchmark == "generate":
        return chip.decoded_bytes(mine) * mine.fields["steps"] / seconds / rates["copies"]
    asked = chip.products(task.benchmark, mine)
    return None if asked is None else asked / seconds / rates["products"]


def report(name: str, task: Task, sides: Mapping[str, Side], part: float | None) -> dict[str, Any]:
    """Return the measurements of a task as JSON values, with its bounds."""
    ours = sides[harness.OURS]
    codes = task.module().codes
    found: dict[str, Any] = {"task": name, "pictures": task.pictures, "share": part, "sides": {}}
    for side, measured in sides.items():
        differs = None
        if ours.result and measured.result:
            differs = harness.difference(ours.result, measured.result, codes)
        found["sides"][side] = {
            "seconds": measured.seconds, "median": measured.median, "first": measured.first,
            "ratio": measured.median / ours.median, "peak": measured.peak, "difference": differs,
            "error": measured.error,
        }  # fmt: skip
    bounds = {f"time of {r} / ours": (m, found["sides"][r]["ratio"])
              for r, m in task.bounds.items() if r in sides}  # fmt: skip
    if task.share is not None and part is not None:
        bounds["share of the chip's rate"] = (task.share, part)
    found["bounds"] = [
        {"what": what, "least": least, "value": value, "kept": bool(value >= least)}
        for what, (least, value) in bounds.items()
    ]
    return found


def lines(found: Mapping[str, Any]) -> str:
    """Return a task as text: a line for each side, and for each bound."""
    rows = []
    for name, side in found["sides"].items():
        part = found["share"] if name == harness.OURS else None
        cells = (
            ("" if part is None else f"{part:.0%}", 8),
            ("" if side["peak"] is None else f"{side['peak'] / GIB:.2f}", 9),
            ("" if side["difference"] is None else f"{side['difference']:.1e}", 12),
        )
        row = (
            f"{found['task']:12}{name:18}{1e3 * side['median']:11.1f}"
            f"{side['first']:9.1f}{side['ratio']:9.2f}"
        )
        row += "".join(f"{text:>{width}}" for text, width in cells)
        rows.append(f"{row}  {side['error']}".rstrip())
    for bound in found["bounds"]:
        kept = "kept" if bound["kept"] else "MISSED"
        what = f"{bound['what']}: {bound['value']:.2f}, at least {bound['least']:g}: {kept}"
        rows.append(f"{'':12}{what}")
    return "\n".join(rows)


HEADER = (
    f"{'task':12}{'side':18}{'ms':>11}{'first s':>9}{'/ ours':>9}{'share':>8}{'GiB':>9}"
    f"{'difference':>12}"
)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print, write and return all measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=ABOUT)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any machine")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="names; may be empty")
    parser.add_argument("--rounds", type=int, default=3, help="runs of a side after its first")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=pathlib.Path, help="the file to write all to")
    parser.add_argument("--environments", type=pathlib.Path, default=harness.ENVIRONMENTS)
    args = parser.parse_args(argv)
    # Rivals use the chip too: JAX takes the memory that it needs, rather than three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    tasks, rivals = {}, tuple(filter(None, args.rivals.split(",")))
    for name in args.tasks.split(","):
        if name not in TASKS:
            parser.error(f"--tasks: {name!r} is not one of {', '.join(TASKS)}")
        tasks[name] = TASKS[name]
    if unknown := set(rivals) - set(RIVALS):
        parser.error(f"--rivals: {', '.join(unknown)}: there are {', '.join(RIVALS)}")
    device = jax.local_devices()[0]
    if device.platform == "cpu" and not args.tiny:
        parser.error("JAX finds no accelerator; --tiny runs on a CPU")

    size = (tiny if args.tiny else full)(args.dtype)
    content: dict[str, Any] = {
        "device": device.device_kind, "jax": jax.__version__, "dtype": args.dtype,
        "tiny": args.tiny, "checks": check(tasks), "tasks": [],
        "rates": {
            "products": chip.product_rate(256 if args.tiny else 8192, args.dtype),
            "copies": chip.copy_rate(2**20 if args.tiny else 2**31),
        },
    }  # fmt: skip
    rates = content["rates"]
    print(
        f"{device.device_kind}, jax {jax.__version__}, {args.dtype}: products at "
        f"{rates['products'] / 1e12:.3g} Tflop/s, copies at {rates['copies'] / 1e9:.4g} GB/s"
    )
    for name, differences in content["checks"].items():
        print(f"{name}: " + ", ".join(f"{k} {v:.1e}" for k, v in differences.items()))
    with tempfile.TemporaryDirectory() as directory:
        pictures = max(task.pictures for task in tasks.values())
        done = work.make(size, pathlib.Path(directory), pictures, accelerator=True)
        pythons = interpreters(rivals, args.environments.absolute())
        others = {
            name: measure_rival(name, tasks, done, args.rounds, python)
            for name, python in pythons.items()
        }
        print(f"\n{HEADER}")
        for name, task in tasks.items():
            sides = {harness.OURS: measure_ours(task, done, args.rounds)}
            sides |= {rival: found[name] for rival, found in others.items() if name in found}
            part = share(task, done, sides[harness.OURS].median, rates)
            content["tasks"].append(report(name, task, sides, part))
            print(lines(content["tasks"][-1]), flush=True)
            if args.json:
                atomic_json(args.json, content)
    return content


if __name__ == "__main__":
    main()
